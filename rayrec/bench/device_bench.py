"""Compare results and speed of a device with a CPU: `make gpu-check`, or `python -m rayrec.bench.device_bench`.

Needs neither Ray nor an internet connection. First every cell and objective is trained for a few steps on the CPU in
float32 and on the device in float32 and bfloat16, and the weights are compared. Steps that are copied to the device
ahead of time are compared with their originals. Then plays per second of training and of batch taste vectors are
measured on random histories, with and without bfloat16 and torch.compile, at 1, 4 and 16 times the default batch. They
are also printed as shares of the limits of the device, measured in the same run. The last figure is the number of plays
that one process reads from files and prepares for steps while one play is trained. Compiled runs that would begin too
late are skipped, so that a GPU takes less than 8 minutes.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, product
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from rayrec.compat import observed_operations
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.ragged import offsets_of
from rayrec.data.split import FitRange
from rayrec.data.windows import Windows, batches_in_memory, cut_windows
from rayrec.model.epochs import start_vectors
from rayrec.model.inference import PLAYS_PER_PASS, TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.song_tables import Share
from rayrec.model.train_config import (
    REGRESSIONS,
    Cell,
    FeatureSpec,
    Objective,
    SongTable,
    TrainConfig,
)
from rayrec.model.training import StepMaker, Training
from rayrec.model.training_windows import ShardReader, stream_batches, window_lengths
from rayrec.storage.artifacts import DatasetManifest, write_dataset_manifest
from rayrec.storage.workspace import Workspace, histories_file

WARM_CALLS = 10  # untimed calls, in which libraries choose and compile their kernels
PRODUCT_ROWS = {"cuda": 8192, "cpu": 1024}  # rows of the square matrices that are multiplied
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # larger than any cache
Work = Literal["train", "tastes"]
WAYS = ((False, False), (True, False), (False, True), (True, True))  # in bfloat16 or not, compiled or not
BATCHES = (1, 4, 16)  # multiples of the default batch
CHECKED_STEPS = 3  # for each cell and objective
TOLERANCES = {False: 0.05, True: 0.2}  # bfloat16 -> allowed mean difference of weights, as a share of their mean change
COPIED_STEPS = 8  # steps whose copies are checked
PRODUCTS = 4  # of large matrices: they keep a device busy for longer than it takes to prepare and copy a step


def per_second(work: Callable[[], float], device: torch.device, seconds: float) -> float:
    """Call `work` for about `seconds` seconds and return the sum of its results per second."""
    for _ in range(WARM_CALLS):
        work()
    amount, started = 0.0, _now(device)
    while True:
        amount += work()
        if time.perf_counter() - started >= seconds:
            return amount / (_now(device) - started)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the floating-point operations per second of products of large square matrices."""
    rows = PRODUCT_ROWS[device.type]
    left, right = (torch.rand(rows, rows, device=device).to(dtype) for _ in range(2))

    def multiply() -> float:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # otherwise the calls would only be queued
        return 2.0 * rows**3

    return per_second(multiply, device, seconds)


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Return the bytes per second that a large copy reads and writes."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)

    def copy_once() -> float:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 2.0 * source.nbytes

    return per_second(copy_once, device, seconds)


class ByteCounter:
    """Counts the bytes that operations read and write, as if nothing were cached or fused."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, operation: str, tensors: list[torch.Tensor]) -> None:
        """Count the bytes of the tensors of one operation, as `observed_operations` gives them."""
        if "empty" not in operation:  # allocations do not touch memory
            self.total += sum(tensor.nbytes for tensor in tensors if tensor.layout == torch.strided)


def cost_per_unit(work: Callable[[], float]) -> tuple[float, float]:
    """Return floating-point operations of products and bytes read and written, per unit of work that `work` returns.

    `work` must run on the CPU, where every step of a recurrent network is a separate product that can be counted; cuDNN
    hides these products.
    """
    byte_counter = ByteCounter()
    with FlopCounterMode(display=False) as flop_counter, observed_operations(byte_counter.add):
        units = work()
    return flop_counter.get_total_flops() / units, byte_counter.total / units


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of the benchmark."""

    songs: int = 100_000
    dim: int = 64
    users: int = 2_000
    plays: int = 200  # mean per user
    seconds: float = 3.0  # per measurement
    compile_until: float = 390.0  # seconds since the start after which no compiled run begins
    plays_per_pass: int = PLAYS_PER_PASS  # of batch taste vectors
    config: TrainConfig = field(default_factory=TrainConfig)

    def times(self, batch: int) -> "Size":
        """Return the sizes with a `batch` times larger batch; `--scale-with-batch` sets learning rate and negatives."""
        config = self.config.replace(batch=self.config.batch * batch, scale_with_batch=True)
        return replace(self, config=config, plays_per_pass=self.plays_per_pass * batch)

    @classmethod
    def quick(cls) -> "Size":
        """Return the sizes of a smoke test."""
        small = TrainConfig(hidden_dim=16, negatives=32, batch=8, window=20, long=(2, 5))
        return cls(songs=500, dim=8, users=30, plays=30, seconds=0.05, config=small)


def measure_device(device: str, size: Size) -> dict[str, Any]:
    """Return all figures: device, checks, limits, reading, and one entry per run with its work, precision and batch."""
    torch.set_num_threads(1)
    torch_device, started = torch.device(device), time.perf_counter()
    result: dict[str, Any] = {
        "device": device,
        "name": torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "one CPU thread",
        "torch": torch.__version__,
        "checks": checks(device),
        "copies_whole": check_copies(device, size),
        "limits": {
            "float32_flops": product_flops(torch_device, torch.float32, size.seconds),
            "bfloat16_flops": product_flops(torch_device, torch.bfloat16, size.seconds),
            "bytes_per_second": copy_bandwidth(torch_device, size.seconds),
        },
    }
    work_kinds: tuple[Work, ...] = ("train", "tastes")
    costs_per_play = {key: _costs_per_play(key[0], size.times(key[1])) for key in product(work_kinds, BATCHES)}
    reading_rates = {batch: reading(size.times(batch)) for batch in BATCHES}
    runs: list[dict[str, Any]] = []
    for (bf16, compiled), work, batch in product(WAYS, work_kinds, BATCHES):
        run: dict[str, Any] = {"work": work, "bfloat16": bf16, "compiled": compiled, "batch": batch}
        if compiled and time.perf_counter() - started >= size.compile_until:
            run["error"] = f"skipped: {size.compile_until:,.0f} seconds had passed"
        else:
            run |= _measure_rate(work, torch_device, size.times(batch), bf16=bf16, compiled=compiled)
        if plays_per_second := run.get("plays_per_second"):
            run |= costs_per_play[work, batch]
            flops_limit = result["limits"]["bfloat16_flops" if bf16 else "float32_flops"]
            run["share_of_flops"] = plays_per_second * run["flops_per_play"] / flops_limit
            run["share_of_bytes"] = (
                plays_per_second * run["unfused_bytes_per_play"] / result["limits"]["bytes_per_second"]
            )
            if work == "train":
                run["read_over_trained"] = reading_rates[batch] / plays_per_second
        runs.append(run)
    return {**result, "reading_plays_per_second": [*reading_rates.values()], "runs": runs}


def _costs_per_play(work: Work, size: Size) -> dict[str, float]:
    """Return the floating-point operations and bytes per play."""
    flops, moved_bytes = cost_per_unit(
        _create_work(work, "cpu", replace(size, users=min(size.users, 200)), bf16=False, compiled=False)
    )
    return {"flops_per_play": flops, "unfused_bytes_per_play": moved_bytes}


def checks(device: str) -> list[dict[str, Any]]:
    """Compare weights after a few steps on the device and on a CPU, for each cell, objective and precision.

    `difference` is the mean difference of the weights, as a share of their mean change on the CPU in float32.
    """
    comparisons = []
    for cell, objective in product(get_args(Cell), get_args(Objective)):
        song_table: SongTable = "frozen" if objective in REGRESSIONS else "trained"
        config = Size.quick().config.replace(cell=cell, objective=objective, song_table=song_table, dropout=0.0)
        size = replace(Size.quick(), config=config)
        initial_weights = network(size).state_dict()
        cpu_weights = train_network(size, "cpu", CHECKED_STEPS).state_dict()
        names = [name for name in initial_weights if not torch.equal(cpu_weights[name], initial_weights[name])]
        mean_change = torch.cat([(cpu_weights[name] - initial_weights[name]).abs().flatten() for name in names]).mean()
        for bf16, tolerance in TOLERANCES.items():
            device_weights = train_network(size, device, CHECKED_STEPS, bf16=bf16).state_dict()
            mean_difference = torch.cat(
                [(cpu_weights[name] - device_weights[name]).abs().flatten() for name in names]
            ).mean()
            relative_difference = float(mean_difference / mean_change)
            comparison = {"cell": cell, "objective": objective, "bfloat16": bf16}
            comparisons.append(
                {**comparison, "difference": relative_difference, "same": relative_difference < tolerance}
            )
    return comparisons


def check_copies(device: str, size: Size) -> bool:
    """Return True if steps that are copied ahead have the same values on the device as on the host.

    First the stream that reads the steps is busy, so that steps are freed before they are read: this finds memory that
    is given to other copies too early. Then the stream that copies is busy: this finds steps that are read too early.
    """
    torch_device, histories = torch.device(device), random_histories(size)
    counts = np.bincount(histories.songs, minlength=size.songs)
    training = Training(network(size), size.config, counts, device=device, share=Share())
    step_maker = StepMaker(training.model.config, size.config, counts, Share())
    batches = list(islice(cycle(batches_of(histories, size.config)), COPIED_STEPS))
    matrix = torch.zeros(PRODUCT_ROWS[torch_device.type], PRODUCT_ROWS[torch_device.type], device=torch_device)
    device_tensors: list[torch.Tensor] = []
    for busy_stream in (None, training.copies):  # None: the current stream, which reads
        for step in training.prepared(batches, 0):
            with torch.cuda.stream(busy_stream):
                for _ in range(PRODUCTS):
                    torch.mm(matrix, matrix)
            step.await_copies()
            device_tensors += [tensor.clone() for tensor in step.tensors]
            del step
    host_tensors = [
        tensor for number, windows in enumerate(batches) for tensor in step_maker.make(windows, 0, number).tensors
    ]
    return all(
        torch.equal(device_tensor.cpu(), tensor)
        for device_tensor, tensor in zip(device_tensors, 2 * host_tensors, strict=True)
    )


def train_network(size: Size, device: str, steps: int, *, bf16: bool = False) -> TasteModel:
    """Train a new network for `steps` steps on a device and return it, moved to the CPU."""
    histories = random_histories(size)
    counts = np.bincount(histories.songs, minlength=size.songs)
    training = Training(network(size), size.config, counts, device=device, share=Share())
    training.bf16 = bf16
    for _ in training.steps(batches_of(histories, size.config)[:steps], 0):
        pass
    return training.model.cpu()


def reading(size: Size) -> float:
    """Return the plays per second that one process reads from files and prepares for steps."""
    config, histories = size.config, random_histories(size)
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        dataset = write_random_histories(Workspace(folder), histories, size.songs)
        step_maker = StepMaker(
            network(size).config, config, np.bincount(histories.songs, minlength=size.songs), Share()
        )
        lengths = window_lengths(dataset, FitRange(), config)
        started, plays = time.perf_counter(), 0
        while time.perf_counter() - started < size.seconds:
            reader = ShardReader(dataset, FitRange(), config, lengths, Share())
            for number, windows in enumerate(stream_batches(reader, 0)):
                plays += step_maker.make(windows, 0, number).plays
        return plays / (time.perf_counter() - started)


def write_random_histories(workspace: Workspace, histories: Histories, songs: int) -> Dataset:
    """Write a data set of one bucket, whose songs have no names."""
    workspace.write_table(histories_file(0, 0), histories.to_arrow())
    manifest = DatasetManifest(
        id="made-up",
        source="made up",
        buckets=1,
        parts=1,
        users=len(histories),
        plays=histories.num_plays,
        songs=songs,
        first_play=int(histories.played_at.min()),
        last_play=int(histories.played_at.max()),
    )
    write_dataset_manifest(workspace, manifest)
    return Dataset(workspace)


def _measure_rate(work: Work, device: torch.device, size: Size, *, bf16: bool, compiled: bool) -> dict[str, Any]:
    torch.compiler.reset()
    try:
        run_work = _create_work(work, str(device), size, bf16=bf16, compiled=compiled)
        return {"plays_per_second": per_second(run_work, device, size.seconds)}
    except RuntimeError as error:  # no compiler for the device, or no such kernel in bfloat16
        return {"error": str(error).strip().splitlines()[0]}


def _create_work(work: Work, device: str, size: Size, *, bf16: bool, compiled: bool) -> Callable[[], float]:
    """Return a function that does a part of the work at each call and returns the number of plays."""
    make_work = _train_work if work == "train" else _taste_work
    return make_work(device, size, bf16=bf16, compiled=compiled)


def _train_work(device: str, size: Size, *, bf16: bool, compiled: bool) -> Callable[[], float]:
    histories, config = random_histories(size), size.config.replace(compiled=compiled)
    counts = np.bincount(histories.songs, minlength=size.songs)
    training = Training(network(size), config, counts, device=device, share=Share())
    training.bf16 = bf16
    reports = training.steps(cycle(batches_of(histories, config)), 0)
    return lambda: float(next(reports).plays)


def _taste_work(device: str, size: Size, *, bf16: bool, compiled: bool) -> Callable[[], float]:
    histories = random_histories(size)
    encoder = TasteEncoder(network(size), device, plays_per_pass=size.plays_per_pass)
    at = int(histories.played_at.max())
    if compiled:
        encoder.model.rnn.compile(dynamic=True)
        encoder.model.dense.compile(dynamic=True)

    def compute_tastes() -> float:
        with torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=bf16):
            _, states = encoder.run(histories)
            for horizon in encoder.model.config.horizons:
                encoder.tastes(states, at, horizon)
        return float(histories.num_plays)

    return compute_tastes


def batches_of(histories: Histories, config: TrainConfig) -> list[Windows]:
    """Return the batches of one epoch."""
    windows = cut_windows(histories, config.window, config.lookahead)
    return list(batches_in_memory(windows, config.batch, np.random.default_rng(0)))


def network(size: Size) -> TasteModel:
    """Return an untrained network of the shape in `size.config`, with the gaps between plays as its features."""
    config = size.config
    shape = config.network_shape(
        num_songs=size.songs, embedding_dim=size.dim, features=FeatureSpec(pause_hours=config.pause_hours)
    )
    torch.manual_seed(config.seed)
    vectors = start_vectors(np.zeros((size.songs, size.dim), dtype=np.float32), config.seed)
    return TasteModel(shape, torch.from_numpy(vectors))


def random_histories(size: Size) -> Histories:
    """Return users with half to one and a half times `size.plays` plays each; few songs are played often."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(size.plays // 2, size.plays * 3 // 2 + 1, size=size.users)
    plays = int(lengths.sum())
    return Histories(
        user_ids=np.array([f"user-{row}" for row in range(size.users)], dtype=object),
        offsets=offsets_of(lengths),
        songs=(size.songs * rng.random(plays) ** 3).astype(np.int32),
        played_at=np.cumsum(rng.integers(1_000, 400_000, size=plays)),
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line: print one table or JSON object; exit with 1 if the results differ from those of a CPU."""
    parser = argparse.ArgumentParser(prog="python -m rayrec.bench.device_bench", description=__doc__)
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to measure, cuda or cpu; default: cuda if available",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    arguments = parser.parse_args(argv)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # hide messages about code that cannot be compiled
    result = measure_device(arguments.device, Size.quick() if arguments.quick else Size())
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else as_table(result))
    if not (result["copies_whole"] and all(check["same"] for check in result["checks"])):
        sys.exit(1)


def as_table(result: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    lines = [f"{result['name']}, torch {result['torch']}", ""]
    for check in result["checks"]:
        verdict = "same as on a CPU" if check["same"] else "NOT THE SAME AS ON A CPU"
        check_label = f"{check['cell']:5} {check['objective']:16} {_precision(check):9}"
        lines.append(f"{check_label} {verdict} (difference {check['difference']:.2%})")
    lines += [f"steps copied ahead of time are {'complete' if result['copies_whole'] else 'NOT COMPLETE'}", ""]
    lines.append("work   batch precision compiled      plays/s  of FLOP/s  of bandwidth    read/train")
    for run in result["runs"]:
        run_label = f"{run['work']:6} x{run['batch']:<4} {_precision(run):9} {'yes' if run['compiled'] else 'no':8}"
        if "error" in run:
            lines.append(f"{run_label} {run['error']}")
            continue
        line = (
            f"{run_label} {run['plays_per_second']:12,.0f} {run['share_of_flops']:10.1%} {run['share_of_bytes']:13.1%}"
        )
        lines.append(line + (f" {run['read_over_trained']:13.2f}" if "read_over_trained" in run else ""))
    lines += [
        "",
        "read/train: plays that one process reads from files and prepares, per play trained in the same time",
    ]
    rates = zip(BATCHES, result["reading_plays_per_second"], strict=True)
    lines.append("plays/s of reading: " + ", ".join(f"x{batch} {rate:,.0f}" for batch, rate in rates) + "\n")
    return "\n".join(lines)


def _precision(entry: dict[str, Any]) -> str:
    return "bfloat16" if entry["bfloat16"] else "float32"


if __name__ == "__main__":
    main()
