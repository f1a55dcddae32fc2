"""The private functions of other packages that compat.py uses give known answers in the installed versions."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pyarrow.fs as pafs
import pytest
import torch
from torch.nn.functional import normalize

from rayrec import compat


@contextmanager
def known(package: str, what: str) -> Iterator[None]:
    """If the block fails, raise an error that says what to do."""
    try:
        yield
    except Exception as error:
        raise AssertionError(
            f"{package} {version(package)} {what} differently: read rayrec/compat.py and mend it"
        ) from error


def test_an_s3_file_system_gives_back_the_options_that_it_was_made_with() -> None:
    given = {
        **{"access_key": "the key", "secret_key": "the secret", "session_token": "the token", "region": "north"},
        **{"scheme": "http", "endpoint_override": "localhost:9000", "connect_timeout": 7.0},
    }
    with known("pyarrow", "pickles S3FileSystem"):
        options = compat.s3_options(pafs.S3FileSystem(**given))
        assert {name: options[name] for name in given} == given
        assert "request_timeout" not in options  # not in `given`
        assert pafs.S3FileSystem(**{**options, "proxy_options": None}).region == "north"
    with known("pyarrow", "parses S3 URIs"):
        parsed, path = pafs.FileSystem.from_uri("s3://key:secret@bucket/a/b?region=south&endpoint_override=host:1")
        assert path == "bucket/a/b"
        options = compat.s3_options(parsed)
        assert (options["access_key"], options["region"], options["endpoint_override"]) == ("key", "south", "host:1")


def test_rows_are_scaled_with_their_norms() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    with known("torch", "normalizes weights"):
        scaled, norms = compat.scaled_rows(rows, torch.tensor([[1.0], [10.0]]))
        torch.testing.assert_close(scaled, torch.tensor([[0.6, 0.8], [0.0, -10.0]]))
        torch.testing.assert_close(norms, torch.tensor([[5.0], [2.0]]))


def test_the_gradient_of_scaled_rows_is_that_of_normalize() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0]], requires_grad=True)
    gradient, ones = torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.ones(2, 1)
    (expected,) = torch.autograd.grad(normalize(rows, dim=1), rows, gradient)
    with known("torch", "differentiates normalized weights"):
        _, norms = compat.scaled_rows(rows.detach(), ones)
        torch.testing.assert_close(compat.scaled_rows_gradient(gradient, rows.detach(), ones, norms), expected)


def test_a_change_is_told_with_what_to_do() -> None:
    with (
        pytest.raises(AssertionError, match=r"torch \S+ counts differently: read rayrec/compat.py"),
        known("torch", "counts"),
    ):
        raise ValueError
