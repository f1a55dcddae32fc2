"""Song embeddings of your own, here from audio: python examples/own_vectors.py audio-folder workspace

The workspace holds a data set; the folder holds one WAV file per song, named by the song's id. The features below,
energies of frequency bands, are simple on purpose: replace them by those of your own model. rayrec reads two files:
vectors.npy, float (songs, D), and vectors.ids.txt, with one song id per line.
"""

import sys
import tempfile
import wave
from pathlib import Path

import numpy as np

import rayrec

BANDS = 24  # frequency bands of equal width on a logarithmic scale
FRAME = 2048  # samples per frame


def features(path: Path) -> np.ndarray:
    """Return float32 (2 · BANDS,): mean and standard deviation over time of the log energy in each band."""
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise SystemExit(f"{path} has {8 * file.getsampwidth()} bits a sample; this example reads 16")
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)[:: file.getnchannels()]
    samples = np.pad(samples, (0, max(0, FRAME - len(samples))))  # fill a short file with silence up to one frame
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME) / 32768
    power = np.abs(np.fft.rfft(frames * np.hanning(FRAME), axis=1)) ** 2
    edges = np.unique(np.geomspace(2, power.shape[1], BANDS + 1).astype(int))
    energy = np.log(np.add.reduceat(power, edges[:-1], axis=1) + 1e-9)
    return np.concatenate([energy.mean(axis=0), energy.std(axis=0)]).astype(np.float32)


def main(audio: str, folder: str) -> None:
    files = sorted(Path(audio).glob("*.wav"))
    if not files:
        raise SystemExit(f"{audio} holds no .wav files")
    raw = np.stack([features(path) for path in files])
    # Center and scale: rayrec compares by cosine, and with a common offset all songs would look alike.
    vectors = (raw - raw.mean(axis=0)) / (raw.std(axis=0) + 1e-6)
    with tempfile.TemporaryDirectory() as temporary:
        table = Path(temporary) / "vectors.npy"
        np.save(table, vectors, allow_pickle=False)
        table.with_suffix(".ids.txt").write_text("\n".join(path.stem for path in files))
        made = rayrec.embed(rayrec.Workspace(folder), rayrec.EmbedConfig(vectors=str(table)))
    print(f"song embeddings {made.id}: {made.metrics['coverage']:.0%} of the plays are of songs that have one")
    for row in made.metrics["neighbors"]:
        print(f"  {row['song']}: {', '.join(row['neighbors'][:3])}")
    print("next: rayrec train, which starts from them, or rayrec train --song-table frozen, which keeps them")


if __name__ == "__main__":
    main(*sys.argv[1:])
