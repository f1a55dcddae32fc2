"""The pins of constraints.txt."""

from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def pins(python: str) -> dict[str, str]:
    """Return the pinned version of each distribution, by its canonical name, for a Python such as `3.12`.

    Raises AssertionError if a distribution has two pins there.
    """
    versions: dict[str, str] = {}
    for line in CONSTRAINTS.read_text("utf-8").splitlines():
        pin = Requirement(line)
        full_version = f"{python}.9"
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": full_version}):
            name = canonicalize_name(pin.name)
            assert name not in versions, f"{name} is pinned twice for Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            versions[name] = specifier.version
    return versions
