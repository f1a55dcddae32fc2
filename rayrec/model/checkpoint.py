"""Stores networks and checkpoints of trainings as safetensors, .npy and JSON, so that loading runs no code."""

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from rayrec.errors import DamagedArtifactError
from rayrec.model.network import TABLES, TasteModel
from rayrec.model.song_tables import Share
from rayrec.model.train_config import MODEL_CONFIG, SONG_VECTORS, ModelConfig
from rayrec.model.training import Training, TrainingState
from rayrec.storage.workspace import Workspace

WEIGHTS = "model.safetensors"
INPUT_VECTORS = "input_vectors.npy"  # vectors of songs as inputs, if they have a separate table
SONGS_AT_ONCE = 1 << 16  # songs per part when vectors are mapped, written or read
EPOCHS = "epochs.jsonl"
TENSORBOARD = "tensorboard"  # folder of TensorBoard events
COMMON, ROWS, PROGRESS = "common.safetensors", "rows-{rank:05}-of-{workers:05}.safetensors", "progress.json"
BEST = "best"  # prefix of the weights of the best network so far


def export_song_vectors(model: TasteModel, is_known: np.ndarray) -> Tensor:
    """float32 (n, D): the normalized song vectors that the model scores; zeros where not `is_known`, bool (n,)."""
    return torch.cat([*_export_parts(model.song_vectors, model, is_known, model.config.num_songs)])


@torch.inference_mode()
def _export_parts(
    vectors_of: Callable[[Tensor], Tensor], model: TasteModel, is_known: np.ndarray, max_songs: int
) -> Iterator[Tensor]:
    """Yield the vectors of the model's songs in parts: as many as `max_songs` songs need, and at least one."""
    device = model.songs.weight.device
    for start in range(0, max(1, max_songs), SONGS_AT_ONCE):
        rows = torch.arange(start, min(start + SONGS_AT_ONCE, model.config.num_songs), device=device)
        is_known_n1 = torch.from_numpy(is_known[start : start + SONGS_AT_ONCE, None]).to(device)
        yield vectors_of(rows).float().where(is_known_n1, 0.0)


def save_model(
    workspace: Workspace, folder: str, model: TasteModel, is_known: np.ndarray, share: Share | None = None
) -> list[str]:
    """Write a network to a folder of the workspace and return the names of its files.

    If the song tables are divided among several workers, all must call this function, each with a network of its own
    rows; `is_known`, bool (n,), is True for the songs among them that the network knows. The first worker writes the
    files, and holds only a few rows of each worker at a time.
    """
    share = share or Share()
    total = int(share.total(model.config.num_songs))
    max_songs = -(-total // share.workers)  # songs per worker, at most: every worker takes part in each gather
    file_names = [WEIGHTS, SONG_VECTORS, MODEL_CONFIG]
    _write_rows(
        workspace,
        f"{folder}/{SONG_VECTORS}",
        _export_parts(model.song_vectors, model, is_known, max_songs),
        total,
        share,
    )
    if model.inputs is not None:
        inputs = _export_parts(model.input_vectors, model, is_known, max_songs)
        _write_rows(workspace, f"{folder}/{INPUT_VECTORS}", inputs, total, share)
        file_names.append(INPUT_VECTORS)
    if not share.rank:
        weights = {name: value for name, value in model.state_dict().items() if name not in TABLES}
        workspace.write_bytes(f"{folder}/{WEIGHTS}", save(_copy_to_cpu(weights)))
        workspace.write_json(f"{folder}/{MODEL_CONFIG}", asdict(replace(model.config, num_songs=total)))
    return file_names


def _write_rows(workspace: Workspace, path: str, parts: Iterator[Tensor], total: int, share: Share) -> None:
    """Write the rows of all workers as one .npy file, float32 (total, D)."""
    with ExitStack() as stack:
        stream = None if share.rank else stack.enter_context(workspace.open_output(path))
        remaining = total
        for index, part in enumerate(parts):
            rows = share.interleaved(part, min(remaining, SONGS_AT_ONCE * share.workers))
            remaining -= SONGS_AT_ONCE * share.workers
            if stream is None or rows is None:
                continue
            if not index:
                header = {"descr": "<f4", "fortran_order": False, "shape": (total, rows.shape[1])}
                np.lib.format.write_array_header_1_0(stream, header)
            stream.write(rows.cpu().contiguous().numpy().data)


def load_model(workspace: Workspace, folder: str, checksums: Mapping[str, str] | None = None) -> TasteModel:
    """Return the network in a folder of a models artifact, ready for inference.

    Its song table is memory-mapped, so the processes of a node share it. `checksums`, by file name, are verified when
    files are fetched from object storage. Raises `DamagedArtifactError` if the files do not fit together.
    """
    checksum_of = checksums or {}
    config = ModelConfig.from_json(workspace.read_json(f"{folder}/{MODEL_CONFIG}"))
    names = [SONG_VECTORS, INPUT_VECTORS] if config.input_table else [SONG_VECTORS]
    tables = [_read_table(workspace, f"{folder}/{name}", checksum_of.get(name), config) for name in names]
    model = TasteModel(config, *tables, shared=True)
    weights = load_file(workspace.local_file(f"{folder}/{WEIGHTS}", checksum_of.get(WEIGHTS)))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - set(TABLES):
        raise DamagedArtifactError(
            f"{folder}/{WEIGHTS} does not fit the network: missing {missing}, unexpected {unexpected}; "
            "run `rayrec train --force`"
        )
    model.exported = True
    return model.requires_grad_(False).eval()


def _read_table(workspace: Workspace, path: str, sha256: str | None, config: ModelConfig) -> Tensor:
    # Copy on write, since torch does not support read-only tensors.
    vectors = np.load(workspace.local_file(path, sha256), mmap_mode="c", allow_pickle=False)
    if vectors.shape != (config.num_songs, config.embedding_dim):
        raise DamagedArtifactError(
            f"{path} has shape {vectors.shape}; expected {(config.num_songs, config.embedding_dim)}; "
            "run `rayrec train --force`"
        )
    return torch.from_numpy(vectors)


def save_training(
    folder: Path, state: TrainingState, best_weights: dict[str, Tensor] | None, progress: dict[str, Any], share: Share
) -> None:
    """Write one worker's part of a training's checkpoint to a local folder.

    `state` is the result of `Training.state`. `best_weights` are those of the best network so far; its tables hold this
    worker's rows. The parts of all workers in one folder form a checkpoint.
    """
    prefixed_weights = {f"{BEST}/{name}": value for name, value in (best_weights or {}).items()}
    best_rows = {name: value for name, value in prefixed_weights.items() if name.removeprefix(f"{BEST}/") in TABLES}
    name = ROWS.format(rank=share.rank, workers=share.workers)
    save_file(_copy_to_cpu({**state.rows, **best_rows}), folder / name)
    if not share.rank:
        best_common = {name: value for name, value in prefixed_weights.items() if name not in best_rows}
        save_file(_copy_to_cpu(state.common | best_common), folder / COMMON)
        (folder / PROGRESS).write_text(json.dumps(progress, allow_nan=False))


def load_training(folder: Path, training: Training) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Restore a training from a checkpoint of any number of workers; return the best weights so far and the progress.

    The tables of these weights hold this worker's rows. Raises `DamagedArtifactError` if a worker's part is missing.
    """
    common, rows = load_file(folder / COMMON), StoredRows(folder, training.share)
    training.load(TrainingState(common=common, rows=rows))
    best_names = [name for name in [*common, *rows] if name.startswith(f"{BEST}/")]
    best_weights = {
        name.removeprefix(f"{BEST}/"): common[name] if name in common else rows[name] for name in best_names
    }
    return best_weights or None, json.loads((folder / PROGRESS).read_text())


class StoredRows(Mapping[str, Tensor]):
    """A worker's rows of the tensors in a checkpoint; each is read when it is requested, so that one is in memory.

    The rows are collected in parts from the files that all workers of the checkpoint wrote. Raises
    `DamagedArtifactError` if the part of a worker is missing.
    """

    def __init__(self, folder: Path, share: Share) -> None:
        self._share = share
        self._files = sorted(folder.glob("rows-*.safetensors"))
        num_files = len(self._files)
        if not num_files or self._files[-1].name != ROWS.format(rank=num_files - 1, workers=num_files):
            raise DamagedArtifactError(
                f"checkpoint {folder} is incomplete: it holds the rows of only {num_files} workers; run "
                "`rayrec train --restart`"
            )
        self._totals: dict[str, int] = defaultdict(int)  # rows of all workers, by the name of the tensor
        for path in self._files:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    self._totals[name] += file.get_slice(name).get_shape()[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._totals)

    def __len__(self) -> int:
        return len(self._totals)

    def __getitem__(self, name: str) -> Tensor:
        """Read this worker's rows of a tensor."""
        if name not in self._totals:
            raise KeyError(name)
        share, worker_rows = self._share, torch.empty(0)
        for rank, path in enumerate(self._files):
            if (rank - share.rank) % math.gcd(len(self._files), share.workers):
                continue  # the file has no row of this worker
            with safe_open(path, "np") as file:  # the numpy interface reads only the slice
                stored_rows = file.get_slice(name)
                length = stored_rows.get_shape()[0]
                for start in range(0, length, SONGS_AT_ONCE):
                    values = torch.from_numpy(stored_rows[start : min(start + SONGS_AT_ONCE, length)])
                    rows = rank + len(self._files) * torch.arange(start, start + len(values))
                    is_kept = rows % share.workers == share.rank
                    if not len(worker_rows):
                        count = len(range(share.rank, self._totals[name], share.workers))
                        worker_rows = values.new_empty(count, *values.shape[1:])
                    worker_rows[rows[is_kept] // share.workers] = values[is_kept]
        return worker_rows


def _copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def write_epochs(workspace: Workspace, folder: str, epochs: list[dict[str, Any]]) -> None:
    """Write one line with a JSON object per epoch to a file in a folder of the workspace."""
    lines = "".join(json.dumps(epoch) + "\n" for epoch in epochs)
    workspace.write_bytes(f"{folder}/{EPOCHS}", lines.encode())


def write_tensorboard(workspace: Workspace, folder: str, epochs: list[dict[str, Any]]) -> bool:
    """Write the figures of each epoch as scalars named phase/figure. Without TensorBoard, do nothing; return False."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    with tempfile.TemporaryDirectory(prefix="rayrec-") as local_folder:
        writer = SummaryWriter(local_folder)
        for epoch in epochs:
            for name, value in epoch.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    writer.add_scalar(f"{epoch['phase']}/{name}", value, epoch["epoch"])
        writer.close()
        for path in sorted(Path(local_folder).iterdir()):
            workspace.put_file(path, f"{folder}/{TENSORBOARD}/{path.name}")
    return True
