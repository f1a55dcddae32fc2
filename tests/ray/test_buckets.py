"""Workers over buckets on a real cluster."""

import sys

import numpy as np
import pytest
import ray.cloudpickle

from rayrec.errors import DamagedArtifactError
from rayrec.jobs.buckets import run_buckets

pytestmark = pytest.mark.usefixtures("cluster")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


class Adder:
    """Adds its number to every unit; refuses unit 3."""

    def __init__(self, number: np.ndarray, *, refuse: bool = False) -> None:
        self.number, self.refuse = number, refuse

    def __call__(self, unit: int) -> dict[str, int]:
        if self.refuse and unit == 3:
            raise DamagedArtifactError("bucket 3 is damaged; make it again")
        return {"unit": int(unit), "sum": int(unit + self.number.sum())}


def test_every_unit_is_done_once() -> None:
    results = list(run_buckets(Adder, range(7), arguments={"number": np.ones(10)}))
    assert sorted((result["unit"], result["sum"]) for result in results) == [(unit, unit + 10) for unit in range(7)]


def test_two_jobs_do_not_share_a_worker() -> None:
    for number in (1, 2):
        results = run_buckets(Adder, range(4), arguments={"number": np.array([number])})
        assert sorted(result["sum"] for result in results) == [number, number + 1, number + 2, number + 3]


def test_no_units_are_no_work() -> None:
    assert list(run_buckets(Adder, [], arguments={"number": np.ones(1)})) == []


def test_an_error_of_ours_comes_out_as_it_was_raised() -> None:
    with pytest.raises(DamagedArtifactError, match="bucket 3 is damaged"):
        list(run_buckets(Adder, range(5), arguments={"number": np.ones(1), "refuse": True}))
