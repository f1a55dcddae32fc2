"""The figures of each epoch at rest: JSON lines, and TensorBoard's events where it is installed."""

import json
import tempfile
from pathlib import Path
from typing import Any

from rayrec.storage.workspace import Workspace

EPOCHS = "epochs.jsonl"
TENSORBOARD = "tensorboard"  # folder of events


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
