"""Stored networks and half-done trainings: safetensors, .npy and JSON, so that loading runs no code."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from rayrec.errors import DamagedArtifactError
from rayrec.model.network import TABLES, TasteModel
from rayrec.model.train_config import ModelConfig
from rayrec.model.training import Training
from rayrec.storage.workspace import Workspace

WEIGHTS = "model.safetensors"
SONG_VECTORS = "song_vectors.npy"  # that taste vectors are compared with
INPUT_VECTORS = "input_vectors.npy"  # of songs as inputs, where they have a table of their own
MODEL_CONFIG = "model.json"
SONGS_AT_ONCE = 1 << 16  # that go through the map of song vectors
EPOCHS = "epochs.jsonl"
TENSORBOARD = "tensorboard"  # folder of events


def export_song_vectors(model: TasteModel, known: np.ndarray) -> np.ndarray:
    """float32 (N, D): the normalized vectors that the model scores against; zero where not `known`, bool (N,)."""
    return _exported(model.song_vectors, model, known)


def _exported(vectors_of: Callable[[Tensor], Tensor], model: TasteModel, known: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        rows = torch.arange(model.config.num_songs, device=model.songs.weight.device)
        parts = [vectors_of(rows[begin : begin + SONGS_AT_ONCE]) for begin in range(0, len(rows), SONGS_AT_ONCE)]
        vectors = torch.cat(parts).float().cpu().numpy()
    return np.where(known[:, None], vectors, np.float32(0.0))


def save_model(workspace: Workspace, folder: str, model: TasteModel, known: np.ndarray) -> list[str]:
    """Write a network into a folder of the workspace; the names of its files."""
    weights = {name: value for name, value in model.state_dict().items() if name not in TABLES}
    workspace.write_bytes(f"{folder}/{WEIGHTS}", save(_on_cpu(weights)))
    workspace.write_array(f"{folder}/{SONG_VECTORS}", export_song_vectors(model, known))
    written = [WEIGHTS, SONG_VECTORS, MODEL_CONFIG]
    if model.inputs is not None:
        workspace.write_array(f"{folder}/{INPUT_VECTORS}", _exported(model.input_vectors, model, known))
        written.append(INPUT_VECTORS)
    workspace.write_json(f"{folder}/{MODEL_CONFIG}", asdict(model.config))
    return written


def load_model(workspace: Workspace, folder: str, checksums: Mapping[str, str] | None = None) -> TasteModel:
    """The network in the folder of a models artifact, ready for inference.

    Its song table is memory-mapped: the processes of a node share it. `checksums`, by file name, are compared
    where files are fetched from object storage. Raises `DamagedArtifactError` where its parts do not fit together.
    """
    known = checksums or {}
    config = ModelConfig.from_json(workspace.read_json(f"{folder}/{MODEL_CONFIG}"))
    names = [SONG_VECTORS, INPUT_VECTORS] if config.input_table else [SONG_VECTORS]
    tables = [_read_table(workspace, f"{folder}/{name}", known.get(name), config) for name in names]
    model = TasteModel(config, *tables, shared=True)
    weights = load_file(workspace.local_file(f"{folder}/{WEIGHTS}", known.get(WEIGHTS)))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - set(TABLES):
        raise DamagedArtifactError(
            f"{folder}/{WEIGHTS} lacks {missing} and has {unexpected}, which the network does not know; "
            "train the model again"
        )
    model.exported = True
    return model.requires_grad_(False).eval()


def _read_table(workspace: Workspace, path: str, sha256: str | None, config: ModelConfig) -> Tensor:
    # Copy on write, since torch knows no read-only tensors.
    vectors = np.load(workspace.local_file(path, sha256), mmap_mode="c", allow_pickle=False)
    if vectors.shape != (config.num_songs, config.embedding_dim):
        raise DamagedArtifactError(
            f"{path} is {vectors.shape}, the model expects {(config.num_songs, config.embedding_dim)}; "
            "train the model again"
        )
    return torch.from_numpy(vectors)


def save_training(
    folder: Path, state: dict[str, dict[str, Tensor]], best: dict[str, Tensor] | None, progress: dict[str, Any]
) -> None:
    """Write where a training stands, `Training.state()`, into a local folder."""
    for name, tensors in state.items():
        save_file(_on_cpu(tensors), folder / f"{name}.safetensors")
    if best is not None:
        save_file(_on_cpu(best), folder / "best.safetensors")
    (folder / "progress.json").write_text(json.dumps(progress, allow_nan=False))


def load_training(folder: Path, training: Training) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Put a training back where `save_training` left it; the best weights so far and its progress."""
    training.load({name: load_file(folder / f"{name}.safetensors") for name in ("model", "optimizers")})
    best = load_file(folder / "best.safetensors") if (folder / "best.safetensors").exists() else None
    return best, json.loads((folder / "progress.json").read_text())


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def write_epochs(workspace: Workspace, folder: str, epochs: list[dict[str, Any]]) -> None:
    """One JSON object a line and epoch, into a folder of the workspace."""
    lines = "".join(json.dumps(line) + "\n" for line in epochs)
    workspace.write_bytes(f"{folder}/{EPOCHS}", lines.encode())


def write_tensorboard(workspace: Workspace, folder: str, epochs: list[dict[str, Any]]) -> bool:
    """The numbers of each epoch as scalars named phase/figure; False, and nothing done, without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    with tempfile.TemporaryDirectory(prefix="rayrec-") as local:
        writer = SummaryWriter(local)
        for line in epochs:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    writer.add_scalar(f"{line['phase']}/{name}", value, line["epoch"])
        writer.close()
        for path in sorted(Path(local).iterdir()):
            workspace.put_file(path, f"{folder}/{TENSORBOARD}/{path.name}")
    return True
