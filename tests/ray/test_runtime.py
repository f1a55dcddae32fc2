"""Settings that jobs make for their processes: huge pages for large tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import ray.cloudpickle

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(encoding="utf-8"),
    reason="no huge pages: write `madvise` into /sys/kernel/mm/transparent_hugepage/enabled on Linux",
)


def asks_for_huge_pages() -> bool:
    """Return True if the memory of a new large tensor in this process is marked for huge pages."""
    import torch

    tensor = torch.zeros(1 << 24)
    start = None
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(bound, 16) for bound in words[0].split("-"))
        elif words[0] == "VmFlags:" and start is not None and start <= tensor.data_ptr() < end:
            return "hg" in words
    return False


@pytest.mark.usefixtures("cluster")
def test_large_tensors_of_ray_workers_are_in_huge_pages() -> None:
    assert ray.get(ray.remote(asks_for_huge_pages).remote())


def test_large_tensors_of_a_job_in_this_process_are_in_huge_pages() -> None:
    code = "import rayrec.jobs.runtime, test_runtime; print(test_runtime.asks_for_huge_pages())"
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", code]
    process = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    assert process.stdout.strip() == "True"
