"""Uses of private parts of pyarrow and torch that have no public counterpart. Importing this module loads neither.

Each function names the version in which the private part was read; `tests/unit/test_compat.py` fails if the installed
version behaves differently. Uses of private parts of Ray Serve are in rayrec/serving/serve_compat.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow.fs as pafs
    from torch import Tensor


def s3_options(filesystem: "pafs.S3FileSystem") -> dict[str, Any]:
    """Return the options with which an `S3FileSystem` was made, including those from a URI; read in pyarrow 24.0.

    Options that were not set are left out. Only pickling gives access to the options.
    """
    _, (options,) = filesystem.__reduce__()
    return {name: value for name, value in options.items() if value not in ("", -1.0)}


def scaled_rows(rows_nD: "Tensor", lengths_n1: "Tensor") -> "tuple[Tensor, Tensor]":
    """Scale nonzero rows (n, D) to lengths (n, 1); return them and their former norms (n, 1); read in torch 2.13.

    This is the fused operation of weight normalization: one pass over memory instead of the three of
    `torch.nn.functional.normalize`.
    """
    import torch

    scaled_nD, norms_n1 = torch._weight_norm_interface(rows_nD, lengths_n1, 0)
    return scaled_nD, norms_n1


def scaled_rows_gradient(grad_nD: "Tensor", rows_nD: "Tensor", lengths_n1: "Tensor", norms_n1: "Tensor") -> "Tensor":
    """Return the gradient (n, D) with respect to the input rows of `scaled_rows`; read in torch 2.13."""
    import torch

    grad_rows_nD: Tensor
    grad_rows_nD, _ = torch.ops.aten._weight_norm_interface_backward(grad_nD, rows_nD, lengths_n1, norms_n1, 0)
    return grad_rows_nD


@contextmanager
def observed_operations(observe: "Callable[[str, list[Tensor]], None]") -> Iterator[None]:
    """Call `observe(name, tensors)` after each operation of torch in the block that is not a view; read in torch 2.13.

    `name` is that of the operation and its overload, such as "aten.add.Tensor". `tensors` are those that it reads and
    those that it returns.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            options = kwargs or {}
            result = func(*args, **options)
            if not func.is_view:
                inputs = [value for name, value in options.items() if name != "out"]  # `out` is the result
                leaves = tree_leaves((args, inputs, result))
                observe(str(func), [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
            return result

    with Observer():  # type: ignore[no-untyped-call]
        yield
