"""The process of the plain loops."""

import os

import pytest

from rayrec.bench.rounds import PlainProcess, niceness


def threads() -> str:
    return os.environ["OMP_NUM_THREADS"]


def fail() -> None:
    raise ValueError("planted")


def test_it_is_as_nice_as_asked_in_another_process_with_one_thread() -> None:
    own = niceness()
    with PlainProcess(own + 3) as plain:
        assert plain.run(niceness) == own + 3
        assert plain.run(os.getpid) == plain.run(os.getpid) != os.getpid()
        assert plain.run(threads) == "1"
        with pytest.raises(ValueError, match="planted"):
            plain.run(fail)
    assert niceness() == own
