"""The private functions of other packages that compat.py uses give known answers in the installed versions."""

import pyarrow.fs as pafs
import pytest
import torch
from explanations import explain_failure
from torch.nn.functional import normalize

from rayrec import compat


def test_an_s3_file_system_gives_back_the_options_that_it_was_made_with() -> None:
    arguments = {
        **{"access_key": "the key", "secret_key": "the secret", "session_token": "the token", "region": "north"},
        **{"scheme": "http", "endpoint_override": "localhost:9000", "connect_timeout": 7.0},
    }
    with explain_failure("pyarrow", "pickles S3FileSystem"):
        options = compat.s3_options(pafs.S3FileSystem(**arguments))
        assert {name: options[name] for name in arguments} == arguments
        assert "request_timeout" not in options  # not in `arguments`
        assert pafs.S3FileSystem(**{**options, "proxy_options": None}).region == "north"
    with explain_failure("pyarrow", "parses S3 URIs"):
        file_system, path = pafs.FileSystem.from_uri("s3://key:secret@bucket/a/b?region=south&endpoint_override=host:1")
        assert path == "bucket/a/b"
        options = compat.s3_options(file_system)
        assert (options["access_key"], options["region"], options["endpoint_override"]) == ("key", "south", "host:1")


def test_rows_are_scaled_with_their_norms() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    with explain_failure("torch", "normalizes weights"):
        scaled, norms = compat.scaled_rows(rows, torch.tensor([[1.0], [10.0]]))
        torch.testing.assert_close(scaled, torch.tensor([[0.6, 0.8], [0.0, -10.0]]))
        torch.testing.assert_close(norms, torch.tensor([[5.0], [2.0]]))


def test_the_gradient_of_scaled_rows_is_that_of_normalize() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0]], requires_grad=True)
    gradient, lengths = torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.ones(2, 1)
    (expected,) = torch.autograd.grad(normalize(rows, dim=1), rows, gradient)
    with explain_failure("torch", "differentiates normalized weights"):
        _, norms = compat.scaled_rows(rows.detach(), lengths)
        torch.testing.assert_close(compat.scaled_rows_gradient(gradient, rows.detach(), lengths, norms), expected)


def test_operations_are_observed_with_the_tensors_that_they_read_and_return() -> None:
    values, target = torch.ones(3), torch.empty(3)
    observed: list[tuple[str, list[int]]] = []
    with explain_failure("torch", "dispatches operations"):
        with compat.observed_operations(
            lambda name, tensors: observed.append((name, [tensor.numel() for tensor in tensors]))
        ):
            torch.add(values, values, out=target)
            target.mul_(2.0)
            values[:2].view(2, 1)
            torch.cat([values, target])
        values.mul_(2.0)  # after the block nothing is observed
        assert observed == [
            ("aten.add.out", [3, 3, 3]),
            ("aten.mul_.Tensor", [3, 3]),
            ("aten.cat.default", [3, 3, 6]),
        ]


@pytest.mark.parametrize("failure", [ValueError, pytest.fail.Exception])
def test_a_failure_says_which_file_to_mend(failure: type[BaseException]) -> None:
    with (
        pytest.raises(AssertionError, match=r"torch \S+ counts differently: read rayrec/compat.py"),
        explain_failure("torch", "counts"),
    ):
        raise failure
