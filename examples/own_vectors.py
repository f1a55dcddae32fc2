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
    band_edges = np.unique(np.geomspace(2, power.shape[1], BANDS + 1).astype(int))
    energy = np.log(np.add.reduceat(power, band_edges[:-1], axis=1) + 1e-9)
    return np.concatenate([energy.mean(axis=0), energy.std(axis=0)]).astype(np.float32)


def main(audio_folder: str, workspace_folder: str) -> None:
    paths = sorted(Path(audio_folder).glob("*.wav"))
    if not paths:
        raise SystemExit(f"{audio_folder} holds no .wav files")
    features_by_song = np.stack([features(path) for path in paths])
    # Center and scale: rayrec compares by cosine, and with a common offset all songs would look alike.
    vectors = (features_by_song - features_by_song.mean(axis=0)) / (features_by_song.std(axis=0) + 1e-6)
    with tempfile.TemporaryDirectory() as temporary_folder:
        vectors_path = Path(temporary_folder) / "vectors.npy"
        np.save(vectors_path, vectors, allow_pickle=False)
        vectors_path.with_suffix(".ids.txt").write_text("\n".join(path.stem for path in paths))
        embeddings = rayrec.embed(rayrec.Workspace(workspace_folder), rayrec.EmbedConfig(vectors=str(vectors_path)))
    print(
        f"song embeddings {embeddings.id}: {embeddings.metrics['coverage']:.0%} of the plays are of songs that have one"
    )
    for row in embeddings.metrics["neighbors"]:
        print(f"  {row['song']}: {', '.join(row['neighbors'][:3])}")
    print("next: rayrec train, which starts from them, or rayrec train --song-table frozen, which keeps them")


if __name__ == "__main__":
    main(*sys.argv[1:])
