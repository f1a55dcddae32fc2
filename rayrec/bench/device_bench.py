"""Plays a second of the taste network on one device, without Ray: `python -m rayrec.bench.device_bench`.

Training steps and batch tastes on made-up histories, each with and without bfloat16 and
torch.compile, as shares of what the device was measured to do in the same run.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any, Literal

import numpy as np
import torch

from rayrec.bench.device_limits import asked, copy_bandwidth, per_second, product_flops
from rayrec.data.histories import Histories
from rayrec.data.windows import Windows, cut_windows, worker_batches
from rayrec.model.fit import start_vectors
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.train_config import FeatureSpec, ModelConfig, TrainConfig
from rayrec.model.training import Training
from rayrec.model.workers import Share

Work = Literal["train", "tastes"]
WAYS = ((False, False), (True, False), (False, True), (True, True))  # of working: in bfloat16, compiled


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much the benchmark does."""

    songs: int = 100_000
    dim: int = 64
    users: int = 2_000
    plays: int = 200  # mean of a user
    seconds: float = 5.0  # of each measurement
    config: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def quick(cls) -> "Size":
        """To see that it works."""
        small = TrainConfig(hidden_dim=16, negatives=32, batch=8, window=20, long=(2, 5))
        return cls(songs=500, dim=8, users=30, plays=30, seconds=0.05, config=small)


def bench(device: str, size: Size) -> dict[str, Any]:
    """All figures as one object: device, limits, model, what a play asks, and a line for each way of working."""
    torch.set_num_threads(1)
    place = torch.device(device)
    limits = {
        "float32_flops": product_flops(place, torch.float32, size.seconds),
        "bfloat16_flops": product_flops(place, torch.bfloat16, size.seconds),
        "bytes_per_second": copy_bandwidth(place, size.seconds),
    }
    runs: list[dict[str, Any]] = []
    needs: dict[str, dict[str, float]] = {}
    works: tuple[Work, ...] = ("train", "tastes")
    for work in works:
        flops, moved = asked(_work(work, "cpu", replace(size, users=min(size.users, 200)), bf16=False, compiled=False))
        needs[work] = {"flops_per_play": flops, "unfused_bytes_per_play": moved}
        for bf16, compiled in WAYS:
            run: dict[str, Any] = {"work": work, "bfloat16": bf16, "compiled": compiled}
            run |= _measured(work, place, size, bf16=bf16, compiled=compiled)
            if plays := run.get("plays_per_second"):
                run["share_of_flops"] = plays * flops / limits["bfloat16_flops" if bf16 else "float32_flops"]
                run["share_of_bytes"] = plays * moved / limits["bytes_per_second"]
            runs.append(run)
    return {
        "device": device,
        "name": torch.cuda.get_device_name(place) if place.type == "cuda" else "one CPU thread",
        "torch": torch.__version__,
        "limits": limits,
        "needs": needs,
        "runs": runs,
    }


def _measured(work: Work, device: torch.device, size: Size, *, bf16: bool, compiled: bool) -> dict[str, Any]:
    torch.compiler.reset()
    try:
        call = _work(work, str(device), size, bf16=bf16, compiled=compiled)
        return {"plays_per_second": per_second(call, device, size.seconds)}
    except RuntimeError as error:  # no compiler for the device, or no such kernel in bfloat16
        return {"error": str(error).strip().splitlines()[0]}


def _work(work: Work, device: str, size: Size, *, bf16: bool, compiled: bool) -> Callable[[], float]:
    """A call of it does some of the work and says how many plays that took."""
    made = _steps if work == "train" else _tastes
    return made(device, size, bf16=bf16, compiled=compiled)


def _steps(device: str, size: Size, *, bf16: bool, compiled: bool) -> Callable[[], float]:
    histories, config = random_histories(size), size.config
    counts = np.bincount(histories.songs, minlength=size.songs)
    training = Training(network(size), config, counts, device=device, share=Share())
    training.bf16 = bf16
    training.model.train()
    if compiled:
        training.compile()
    steps = cycle(enumerate(batches_of(histories, config)))

    def call() -> float:
        step, batch = next(steps)
        training.step(batch, 0, step)
        return float(batch.inputs.sum())

    return call


def _tastes(device: str, size: Size, *, bf16: bool, compiled: bool) -> Callable[[], float]:
    histories, encoder = random_histories(size), TasteEncoder(network(size), device)
    at = int(histories.played_at.max())
    if compiled:
        encoder.model.rnn.compile(dynamic=True)
        encoder.model.dense.compile(dynamic=True)

    def call() -> float:
        with torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=bf16):
            _, states = encoder.run(histories)
            for horizon in encoder.model.config.horizons:
                encoder.tastes(states, at, horizon)
        return float(histories.num_plays)

    return call


def batches_of(histories: Histories, config: TrainConfig) -> list[Windows]:
    """The batches of one epoch."""
    windows = cut_windows(histories, config.window, config.lookahead)
    return list(worker_batches(windows, batch=config.batch, rank=0, workers=1, rng=np.random.default_rng(0)))


def network(size: Size) -> TasteModel:
    """An untrained network of the shape that the settings ask for, with gaps as its features."""
    config = size.config
    shape = ModelConfig(
        num_songs=size.songs,
        embedding_dim=size.dim,
        hidden_dim=config.hidden_dim,
        num_layers=config.num_layers,
        cell=config.cell,
        dropout=config.dropout,
        features=FeatureSpec(),
        horizons=config.horizons,
        song_table=config.song_table,
        averages=config.averages,
        input_table=config.has_input_table,
    )
    torch.manual_seed(config.seed)
    vectors = start_vectors(np.zeros((size.songs, size.dim), dtype=np.float32), config.seed)
    return TasteModel(shape, torch.from_numpy(vectors))


def random_histories(size: Size) -> Histories:
    """Users with half to one and a half times the mean of plays; few songs are played often."""
    random = np.random.default_rng(0)
    lengths = random.integers(size.plays // 2, size.plays * 3 // 2 + 1, size=size.users)
    plays = int(lengths.sum())
    return Histories(
        user_ids=np.array([f"user-{row}" for row in range(size.users)], dtype=object),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        songs=(size.songs * random.random(plays) ** 3).astype(np.int32),
        played_at=np.cumsum(random.integers(1_000, 400_000, size=plays)),
    )


def main(words: list[str] | None = None) -> None:
    """The command line: one line for each way of working, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m rayrec.bench.device_bench", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small, to see that it works")
    given = parser.parse_args(words)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # what cannot be compiled is no news
    told = bench(given.device, Size.quick() if given.quick else Size())
    if given.json:
        json.dump(told, sys.stdout)
        sys.stdout.write("\n")
        return
    for run in told["runs"]:
        ways = (
            f"{run['work']:6} {'bfloat16' if run['bfloat16'] else 'float32':8} {'compiled' if run['compiled'] else ''}"
        )
        figures = run.get("error") or (
            f"{run['plays_per_second']:12,.0f} plays/s {run['share_of_flops']:7.1%} of the measured FLOP/s "
            f"{run['share_of_bytes']:7.1%} of the measured bandwidth"
        )
        sys.stdout.write(f"{ways:25} {figures}\n")


if __name__ == "__main__":
    main()
