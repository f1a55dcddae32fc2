"""Private parts of pyarrow and torch that have no public counterpart. Loads nothing heavy.

Each function names the version that it was read in; `tests/unit/test_compat.py` fails where another version differs.
Those of Ray Serve are in rayrec/serving/serve_compat.py.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow.fs as pafs
    from torch import Tensor


def s3_options(filesystem: "pafs.S3FileSystem") -> dict[str, Any]:
    """The options that `S3FileSystem` was made with, those that were set; read in pyarrow 24.0.

    Pickling alone gives them, and with them what a URI was parsed to.
    """
    _, (options,) = filesystem.__reduce__()
    return {name: value for name, value in options.items() if value not in ("", -1.0)}


def scaled_rows(rows_nD: "Tensor", lengths_n1: "Tensor") -> "tuple[Tensor, Tensor]":
    """Rows (n, D) that are not zero scaled to lengths (n, 1), and their norms (n, 1); read in torch 2.13.

    The fused operation of weight normalization: one pass, where `torch.nn.functional.normalize` takes three.
    """
    import torch

    scaled_nD, norms_n1 = torch._weight_norm_interface(rows_nD, lengths_n1, 0)
    return scaled_nD, norms_n1


def scaled_rows_gradient(grad_nD: "Tensor", rows_nD: "Tensor", lengths_n1: "Tensor", norms_n1: "Tensor") -> "Tensor":
    """The gradient (n, D) by the rows that `scaled_rows` was given; read in torch 2.13."""
    import torch

    grad_rows_nD: Tensor
    grad_rows_nD, _ = torch.ops.aten._weight_norm_interface_backward(grad_nD, rows_nD, lengths_n1, norms_n1, 0)
    return grad_rows_nD
