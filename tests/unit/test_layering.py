"""Imports point one way, Ray stays at the edge, and importing rayrec is cheap."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rayrec

ROOT = Path(rayrec.__file__).parent.parent
# A layer may import itself and the layers of earlier levels, but no other layer of its own level.
LEVELS = [
    {"errors", "compat"},
    {"config", "display", "client"},
    {"storage"},
    {"data"},
    {"importing"},
    {"embeddings"},
    {"model"},
    {"recommend"},
    {"online", "evaluation"},
    {"jobs", "serving"},
    {"bench", "recommender"},
    {"rayrec_cli"},
]
LEVEL = {layer: level for level, layers in enumerate(LEVELS) for layer in layers}
COMPAT_OF_SERVING = "rayrec.serving.serve_compat"  # Ray's private parts: compat is below the layers that import Ray
HEAVY = ("ray", "torch", "gensim", "faiss", "matplotlib")


def modules() -> dict[str, Path]:
    """Return name -> file of every module of rayrec and rayrec_cli."""
    files = {}
    for root in (ROOT, ROOT / "cli"):
        for top in ("rayrec", "rayrec_cli"):
            for path in sorted((root / top).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = modules()


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Yield the full names that a file imports; with `top_only`, only those of import statements at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; spell the whole name"
            full_names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module or "" for name in full_names)


def layer(module: str) -> str | None:
    """Return the layer of a module; None for modules of other packages and for `rayrec` itself."""
    top, *rest = module.split(".")
    if top == "rayrec_cli":
        return top
    return rest[0] if top == "rayrec" and rest else None


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in MODULES} - {None} <= set(LEVEL)
    assert len(MODULES) > 40


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name)])
def test_imports_point_down(name: str) -> None:
    source_layer = layer(name)
    assert source_layer is not None
    for imported_name in imports(MODULES[name]):
        target_layer = layer(imported_name)
        if target_layer is None or target_layer == source_layer or target_layer not in LEVEL:
            continue
        is_forbidden = LEVEL[target_layer] >= LEVEL[source_layer]
        assert not is_forbidden, f"{name} imports {imported_name}: {source_layer} must not know {target_layer}"


def test_ray_is_imported_in_jobs_serving_and_bench_alone() -> None:
    ray_modules = {name for name, path in MODULES.items() if any(item.split(".")[0] == "ray" for item in imports(path))}
    assert {layer(name) for name in ray_modules} <= {"jobs", "serving", "bench"}
    assert ray_modules


def test_private_modules_of_other_packages_are_imported_in_two_modules_alone() -> None:
    private_imports = {
        name: [item for item in imports(path) if re.search(r"(^|\.)_(?!_)", item) and item not in MODULES]
        for name, path in MODULES.items()
    }
    assert {name for name, items in private_imports.items() if items} == {"rayrec.compat", COMPAT_OF_SERVING}


def test_no_two_modules_share_a_name() -> None:
    files = [path.name for path in MODULES.values() if path.name != "__init__.py"]
    assert not {name for name in files if files.count(name) > 1}


def public_functions() -> dict[str, list[str]]:
    """Return name -> the modules that define a public function of that name; without `main`, which programs share."""
    defining_modules: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                defining_modules.setdefault(node.name, []).append(module)
    return {name: module_names for name, module_names in defining_modules.items() if name != "main"}


def test_a_function_name_that_comes_twice_is_a_command_and_the_stage_that_it_calls() -> None:
    duplicates = {name: module_names for name, module_names in public_functions().items() if len(module_names) > 1}
    assert "train" in duplicates
    for name, module_names in duplicates.items():
        (command,) = (module for module in module_names if layer(module) == "rayrec_cli")
        (stage,) = (module for module in module_names if module != command)
        assert stage in imports(MODULES[command]), f"{name} of {command} does not call {name} of {stage}"


def test_there_are_no_import_cycles() -> None:
    graph = {name: {item for item in imports(path, top_only=True) if item in MODULES} for name, path in MODULES.items()}
    visited: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " imports ".join((*trail[trail.index(name) :], name))
        if name not in visited:
            for imported in graph[name]:
                visit(imported, (*trail, name))
            visited.add(name)

    for name in graph:
        visit(name, ())


def loaded_packages(code: str) -> set[str]:
    """Return the heavy packages that a fresh interpreter has loaded after it ran `code`."""
    program = f"import sys\n{code}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(process.stdout.splitlines()[-1].split()) if process.stdout.strip() else set()


@pytest.mark.parametrize(
    "code",
    [
        "import rayrec",
        "import rayrec; dir(rayrec); [getattr(rayrec, name) for name in rayrec.SETTINGS]",
        "import rayrec_cli.main",
        "import rayrec.online.load_states",  # each process that loads states does this
        "from rayrec_cli.main import main; main(['--help'])",
        "from rayrec_cli.main import main; main(['train', '--help'])",
        "from rayrec_cli.main import main; main(['submit', '--help'])",
        "from rayrec_cli.main import main; main(['--workspace', '/nonexistent/rayrec', 'status'])",
    ],
)
def test_quick_imports_and_commands_load_no_heavy_package(code: str) -> None:
    assert loaded_packages(code) == set()


CHECK_WITHOUT_INSTALLATION = """
import importlib.metadata, sys

def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = version
import rayrec.bench.device_bench
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_a_clone_that_is_not_installed_checks_its_gpu_with_the_packages_that_the_makefile_names() -> None:
    process = subprocess.run(
        [sys.executable, "-c", CHECK_WITHOUT_INSTALLATION], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    pyproject = (ROOT / "pyproject.toml").read_text()
    (requirements,) = re.findall(r"^dependencies = \[\n((?:    .*\n)+)", pyproject, flags=re.MULTILINE)
    dependencies = re.findall(r'^    "([a-z]+)', requirements, flags=re.MULTILINE)
    (comment,) = re.findall(r"((?:^#.*\n)+)gpu-check:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    loaded_dependencies = set(dependencies) & set(process.stdout.split())
    assert loaded_dependencies >= {"torch", "numpy"}
    assert loaded_dependencies - set(re.findall(r"\w+", comment)) == set()


def test_the_public_names_are_one_list_and_all_exist() -> None:
    lazy_names = [*rayrec.STAGES, *rayrec.HELPERS, *rayrec.SETTINGS]
    assert sorted(set(rayrec.__all__) - set(lazy_names)) == [
        "DamagedArtifactError",
        "Dataset",
        "InputError",
        "LeakError",
        "MismatchError",
        "MissingDependencyError",
        "NotFoundError",
        "RayrecError",
        "Recommender",
        "Workspace",
        "__version__",
        "load",
    ]
    assert Path(rayrec.__file__).with_name("py.typed").is_file()
    assert len(set(rayrec.__all__)) == len(rayrec.__all__)
    assert dir(rayrec) == sorted(rayrec.__all__)
    for name in rayrec.__all__:
        assert getattr(rayrec, name) is not None
    assert all(callable(getattr(rayrec, name)) for name in lazy_names)


def test_type_checkers_know_the_names_that_are_loaded_at_their_first_use() -> None:
    tree = ast.parse(MODULES["rayrec"].read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    declared_names = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert declared_names == {**rayrec.STAGES, **rayrec.HELPERS, **rayrec.SETTINGS}


def test_every_stage_takes_its_settings_from_a_public_class() -> None:
    for name in rayrec.STAGES:
        classes = re.findall(r"\w+Config\b", str(inspect.signature(getattr(rayrec, name))))
        assert set(classes) <= set(rayrec.SETTINGS), name


def test_every_error_is_one_of_ours_with_an_exit_code() -> None:
    errors = [getattr(rayrec, name) for name in rayrec.__all__ if name.endswith("Error")]
    assert all(issubclass(error, rayrec.RayrecError) for error in errors)
    assert {error.exit_code for error in errors} == {1, 2}
