"""The error names the units whose workers are killed repeatedly, whatever the type of the units."""

from typing import Any

import pytest
from ray.exceptions import WorkerCrashedError

from rayrec.errors import RayrecError
from rayrec.jobs import runtime
from rayrec.jobs.rank import _Growing
from rayrec.jobs.runtime import run_buckets


class Killed:
    """A task whose worker is killed."""

    def options(self, **_: Any) -> "Killed":
        return self

    def remote(self, *_: Any) -> object:
        return object()


def lost(monkeypatch: pytest.MonkeyPatch, units: list[Any], **options: Any) -> str:
    """The error of a job on a cluster that loses every worker."""

    def get(reference: object) -> Any:
        raise WorkerCrashedError

    monkeypatch.setattr(runtime.ray, "nodes", list)
    monkeypatch.setattr(runtime.ray, "put", lambda value: value)
    monkeypatch.setattr(runtime.ray, "remote", lambda work: Killed())
    monkeypatch.setattr(runtime.ray, "wait", lambda references: (references[-1:], references[:-1]))
    monkeypatch.setattr(runtime.ray, "get", get)
    with pytest.raises(RayrecError) as raised:
        list(run_buckets(object, units, arguments={}, **options))
    return str(raised.value)


@pytest.mark.parametrize(
    ("units", "named"),
    [
        ([_Growing("", "folder", "next")], "ranker next of 1 failed"),
        (
            [_Growing("artists", "folder", "served"), _Growing("", "folder", "served"), _Growing("", "folder", "next")],
            "ranker next, served, served without artists of 3 failed",
        ),
    ],
)
def test_rankers_are_named_by_their_kind_and_the_part_left_out(
    monkeypatch: pytest.MonkeyPatch, units: list[Any], named: str
) -> None:
    assert lost(monkeypatch, units, called="ranker").startswith(f"{named}: the worker was killed 4 times")


@pytest.mark.parametrize(
    ("units", "named"),
    [
        (list(range(12)), "bucket 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... of 12 failed"),
        (["b/10", "b/9", "a"], "bucket a, b/9, b/10 of 3 failed"),
        ([(8, 15), (0, 7)], "bucket (0, 7), (8, 15) of 2 failed"),
        ([7, "7", None], "bucket 7, 7, None of 3 failed"),
    ],
)
def test_ten_units_are_named_at_most_with_numbers_in_order(
    monkeypatch: pytest.MonkeyPatch, units: list[Any], named: str
) -> None:
    assert lost(monkeypatch, units).startswith(named)
