"""Stored networks and half-done trainings: safetensors, .npy and JSON, so that loading runs no code."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from rayrec.errors import DamagedArtifactError
from rayrec.model.network import SONG_TABLE, TasteModel
from rayrec.model.train_config import ModelConfig
from rayrec.storage.workspace import Workspace

WEIGHTS = "model.safetensors"
SONG_VECTORS = "song_vectors.npy"
MODEL_CONFIG = "model.json"
SONGS_AT_ONCE = 1 << 16  # that go through the map of song vectors


def export_song_vectors(model: TasteModel, known: np.ndarray) -> np.ndarray:
    """float32 (N, D): the normalized vectors that the model scores against; zero where not `known`, bool (N,)."""
    with torch.inference_mode():
        rows = torch.arange(model.config.num_songs, device=model.songs.weight.device)
        parts = [
            model.song_vectors(rows[begin : begin + SONGS_AT_ONCE]) for begin in range(0, len(rows), SONGS_AT_ONCE)
        ]
        vectors = torch.cat(parts).float().cpu().numpy()
    return np.where(known[:, None], vectors, np.float32(0.0))


def save_model(workspace: Workspace, folder: str, model: TasteModel, known: np.ndarray) -> list[str]:
    """Write a network into a folder of the workspace; the names of its files."""
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items() if name != SONG_TABLE}
    workspace.write_bytes(f"{folder}/{WEIGHTS}", save(weights))
    workspace.write_array(f"{folder}/{SONG_VECTORS}", export_song_vectors(model, known))
    workspace.write_json(f"{folder}/{MODEL_CONFIG}", asdict(model.config))
    return [WEIGHTS, SONG_VECTORS, MODEL_CONFIG]


def load_model(workspace: Workspace, folder: str, checksums: Mapping[str, str] | None = None) -> TasteModel:
    """The network in the folder of a models artifact, ready for inference.

    Its song table is memory-mapped: the processes of a node share it. `checksums`, by file name, are compared
    where files are fetched from object storage. Raises `DamagedArtifactError` where its parts do not fit together.
    """
    known = checksums or {}
    config = ModelConfig.from_json(workspace.read_json(f"{folder}/{MODEL_CONFIG}"))
    # Copy on write, since torch knows no read-only tensors; nothing writes.
    path = workspace.local_file(f"{folder}/{SONG_VECTORS}", known.get(SONG_VECTORS))
    vectors = np.load(path, mmap_mode="c", allow_pickle=False)
    if vectors.shape != (config.num_songs, config.embedding_dim):
        raise DamagedArtifactError(
            f"{folder}/{SONG_VECTORS} is {vectors.shape}, the model expects "
            f"{(config.num_songs, config.embedding_dim)}; train the model again"
        )
    model = TasteModel(config, torch.from_numpy(vectors), shared=True)
    weights = load_file(workspace.local_file(f"{folder}/{WEIGHTS}", known.get(WEIGHTS)))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing != [SONG_TABLE] or unexpected:
        raise DamagedArtifactError(
            f"{folder}/{WEIGHTS} lacks {missing[1:]} and has {unexpected} that the network does not know; "
            "train the model again"
        )
    model.exported = True
    return model.requires_grad_(False).eval()


def save_training(
    folder: Path,
    model: TasteModel,
    optimizers: list[torch.optim.Optimizer],
    best: dict[str, Tensor] | None,
    progress: dict[str, Any],
) -> None:
    """Write where a training stands into a local folder."""
    save_file(
        {name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    tensors = {
        f"{number}/{index}/{key}": torch.as_tensor(value).cpu().contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, slots in optimizer.state_dict()["state"].items()
        for key, value in slots.items()
    }
    save_file(tensors, folder / "optimizers.safetensors")
    if best is not None:
        save_file({name: value.cpu().contiguous() for name, value in best.items()}, folder / "best.safetensors")
    (folder / "progress.json").write_text(json.dumps(progress))


def load_training(
    folder: Path, model: TasteModel, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Put a training back where `save_training` left it; the best weights so far and its progress."""
    model.load_state_dict(load_file(folder / "model.safetensors"))
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, value in load_file(folder / "optimizers.safetensors").items():
        number, index, key = name.split("/")
        slots = states[int(number)].setdefault(int(index), {})
        # SparseAdam counts its steps in a plain int.
        slots[key] = (
            int(value) if isinstance(optimizers[int(number)], torch.optim.SparseAdam) and key == "step" else value
        )
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    best = load_file(folder / "best.safetensors") if (folder / "best.safetensors").exists() else None
    return best, json.loads((folder / "progress.json").read_text())
