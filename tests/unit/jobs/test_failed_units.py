"""Units that Ray could not complete: the error names the cause, and advises on memory only if workers were killed."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from rayrec.errors import RayrecError
from rayrec.jobs import runtime
from rayrec.jobs.runtime import run_buckets


class FailingRay:
    """Has the functions of Ray that `run_buckets` calls; odd units raise `error`, the others return themselves."""

    ObjectRef = int

    def __init__(self, error: RayError) -> None:
        self.error = error

    def put(self, _: Any) -> int:
        return 0

    def nodes(self) -> list[Any]:
        return []

    def remote(self, _: Any) -> Any:
        task = SimpleNamespace(remote=lambda make_worker, stored_arguments, unit: unit)
        return SimpleNamespace(options=lambda **_: task)

    def wait(self, units: list[int]) -> tuple[list[int], list[int]]:
        return units[:1], units[1:]

    def get(self, unit: int) -> tuple[int, None]:
        if unit % 2:
            raise self.error
        return unit, None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (WorkerCrashedError(), "the worker was killed 4 times, probably out of memory"),
        (OutOfMemoryError("node is out of memory"), "the worker was killed 4 times, probably out of memory"),
        (NodeDiedError("node is lost"), "the worker was killed 4 times, probably out of memory"),
        (
            RuntimeEnvSetupError("no space left"),
            "RuntimeEnvSetupError: Failed to set up runtime environment. no space left",
        ),
        (RaySystemError("no module named rayrec"), "RaySystemError: System error: no module named rayrec"),
        (
            RayTaskError("_run_unit", "Traceback", ValueError("wrong\nversion"), "ray::unit", 1, "127.0.0.1"),
            "ValueError: wrong version",
        ),
    ],
)
def test_the_error_of_units_that_ray_could_not_complete_names_the_cause(
    error: RayError, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "ray", FailingRay(error))
    results = run_buckets(SimpleNamespace, range(4), arguments={})
    assert [next(results), next(results)] == [0, 2]
    with pytest.raises(RayrecError) as raised:
        next(results)
    assert str(raised.value).startswith(f"bucket 1, 3 of 4 failed: {reason}. Completed work is kept: ")
    assert ("more memory" in str(raised.value)) == ("killed" in reason)
    assert raised.value.__cause__ is error
