"""What a device can do at most, and what a piece of work asks of it: operations and bytes."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

WARM_CALLS = 10  # in which libraries choose their kernels and compile them: not timed
PRODUCT_ROWS = {"cuda": 8192, "cpu": 1024}  # of the square matrices that are multiplied
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # more than any cache holds


def per_second(work: Callable[[], float], device: torch.device, seconds: float) -> float:
    """What `work` says that it did, a second, over calls for about so many seconds."""
    for _ in range(WARM_CALLS):
        work()
    done, began = 0.0, _now(device)
    while True:
        done += work()
        if time.perf_counter() - began >= seconds:
            return done / (_now(device) - began)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Floating point operations a second of products of large square matrices."""
    rows = PRODUCT_ROWS[device.type]
    left, right = (torch.rand(rows, rows, device=device).to(dtype) for _ in range(2))

    def work() -> float:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # else calls would only queue up
        return 2.0 * rows**3

    return per_second(work, device, seconds)


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)

    def work() -> float:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 2.0 * source.nbytes

    return per_second(work, device, seconds)


class ByteCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operations read and write, as if nothing were cached or fused."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, made))
            self.total += sum(
                leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
            )
        return made


def asked(work: Callable[[], float]) -> tuple[float, float]:
    """Operations of products, and bytes, for each unit that `work` says that it did. To be called on the CPU.

    There every step of a recurrent network is a product of its own that can be counted; cuDNN hides them.
    """
    with FlopCounterMode(display=False) as flops:
        units = work()
    with ByteCounter() as moved:
        work()
    return flops.get_total_flops() / units, moved.total / units
