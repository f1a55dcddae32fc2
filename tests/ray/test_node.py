"""`run_on_node`: one task on one node."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray.cloudpickle

from rayrec.errors import InputError, RayrecError
from rayrec.jobs.runtime import RETRIES, node_cpus, run_on_node

pytestmark = pytest.mark.usefixtures("cluster")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


def squares(last: int) -> Iterator[int]:
    for number in range(1, last + 1):
        yield number * number


def killed(folder: str, times: int) -> Iterator[int]:
    """Yield 1 and 2, but kill the worker in between in the first `times` attempts, as the out-of-memory killer does."""
    yield 1
    attempts = len(list(Path(folder).iterdir()))
    (Path(folder) / str(attempts)).touch()
    if attempts < times:
        os.kill(os.getpid(), signal.SIGKILL)
    yield 2


def yield_and_fail() -> Iterator[int]:
    yield 1
    raise InputError("nothing to do; give plays")


def test_what_a_task_yields_comes_in_its_order() -> None:
    assert list(run_on_node(squares, 4, cpus=node_cpus())) == [1, 4, 9, 16]


def test_a_task_whose_worker_is_killed_begins_again(tmp_path: Path) -> None:
    assert list(run_on_node(killed, str(tmp_path), RETRIES, cpus=1)) == [1, 2]


def test_a_task_that_kills_every_worker_is_named(tmp_path: Path) -> None:
    with pytest.raises(RayrecError, match=r"killed failed: .* killed 4 times, .* more memory"):
        list(run_on_node(killed, str(tmp_path), 99, cpus=1))
    assert len(list(tmp_path.iterdir())) == RETRIES + 1


def test_an_error_of_rayrec_comes_out_as_it_was_raised() -> None:
    with pytest.raises(InputError, match="nothing to do; give plays"):
        list(run_on_node(yield_and_fail, cpus=1))
