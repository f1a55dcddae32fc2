"""The example of song embeddings from audio: every file has features, however short."""

import runpy
import wave
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_vectors.py"


@pytest.mark.parametrize("samples", [0, 1, 2047, 2048, 5000])
def test_a_file_shorter_than_a_frame_has_finite_features(tmp_path: Path, samples: int) -> None:
    path = tmp_path / "song.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((1000 * np.sin(np.arange(samples))).astype(np.int16).tobytes())
    assert np.isfinite(runpy.run_path(str(EXAMPLE), run_name="example")["features"](path)).all()
