import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rayrec.embeddings.vectors import SongVectors
from rayrec.embeddings.word2vec import TOKENS_PER_WORKER, EmbedConfig, Sentences, Word2Vec, write_corpus
from rayrec.errors import InputError


def two_clusters(playlists: int = 300, seed: int = 0) -> Sentences:
    """Playlists of 8 songs each, from songs 0..9 or from songs 10..19."""
    random = np.random.default_rng(seed)
    songs = random.integers(0, 10, size=(playlists, 8)) + 10 * random.integers(0, 2, size=(playlists, 1))
    return songs.ravel().astype(np.int32), np.arange(playlists + 1) * 8


def fit(sentences: Sentences, path: Path, config: EmbedConfig, num_songs: int = 21) -> SongVectors:
    word2vec = Word2Vec(write_corpus([sentences], path, num_songs), config)
    assert list(word2vec.train()) == list(range(1, config.epochs + 1))
    return word2vec.vectors()


def test_songs_of_one_planted_cluster_are_nearest_neighbors(tmp_path: Path) -> None:
    vectors = fit(two_clusters(), tmp_path / "corpus", EmbedConfig(dim=16, epochs=10))
    for song in range(20):
        nearest, cosines = vectors.nearest(song, 9)
        assert set(nearest // 10) == {song // 10}
        assert np.all(np.diff(cosines) <= 0)


def test_vectors_have_length_one_and_songs_outside_the_corpus_have_none(tmp_path: Path) -> None:
    vectors = fit(two_clusters(), tmp_path / "corpus", EmbedConfig(dim=16, epochs=1))
    np.testing.assert_allclose(np.linalg.norm(vectors.vectors[:20], axis=1), 1, rtol=1e-6)
    assert not vectors.known[20]


def test_rare_songs_get_no_vector(tmp_path: Path) -> None:
    songs, offsets = two_clusters()
    sentences = (np.append(songs, [20, 0]).astype(np.int32), np.append(offsets, offsets[-1] + 2))
    assert not fit(sentences, tmp_path / "a", EmbedConfig(epochs=1, min_count=2)).known[20]
    assert fit(sentences, tmp_path / "b", EmbedConfig(epochs=1)).known[20]


def test_one_thread_and_one_seed_give_the_same_vectors(tmp_path: Path) -> None:
    def fit_with_seed(seed: int) -> np.ndarray:
        return fit(two_clusters(), tmp_path / "corpus", EmbedConfig(dim=8, epochs=2, seed=seed)).vectors

    np.testing.assert_array_equal(fit_with_seed(1), fit_with_seed(1))
    assert not np.array_equal(fit_with_seed(1), fit_with_seed(2))


def test_training_by_epochs_equals_one_call_of_gensim(tmp_path: Path) -> None:
    from gensim.models import Word2Vec as Gensim

    path = tmp_path / "corpus"
    # several batches per epoch, so that the falling learning rate matters
    config = EmbedConfig(dim=8, epochs=3, window=2, center=False)
    word2vec = Word2Vec(write_corpus([two_clusters(4_000)], path, 20), config)
    list(word2vec.train())
    gensim = Gensim(
        vector_size=8, sg=1, window=2, negative=config.negatives, ns_exponent=config.ns_exponent,
        alpha=config.learning_rate, sample=0, min_count=1, seed=0, workers=1,
    )  # fmt: skip
    gensim.build_vocab_from_freq({str(row): int(count) for row, count in enumerate(word2vec.corpus.counts)})
    gensim.train(corpus_file=str(path), total_words=word2vec.corpus.tokens, epochs=3)
    raw = np.stack([gensim.wv[str(row)] for row in range(20)])
    np.testing.assert_allclose(word2vec.vectors().vectors, SongVectors.normalized(raw).vectors, atol=1e-4)


def test_the_corpus_file_holds_one_sentence_a_line_and_the_counts(tmp_path: Path) -> None:
    batches = [
        (np.array([3, 1, 3], np.int32), np.array([0, 2, 3])),
        (np.zeros(0, np.int32), np.array([0])),
        (np.array([0, 2], np.int32), np.array([0, 2])),
    ]
    corpus = write_corpus(batches, tmp_path / "corpus", 5)
    assert corpus.path.read_text() == "3 1\n3\n0 2\n"
    assert corpus.counts.tolist() == [1, 1, 1, 2, 0]
    assert (corpus.sentences, corpus.tokens) == (3, 5)


def test_a_small_corpus_gets_few_threads(tmp_path: Path) -> None:
    corpus = write_corpus([two_clusters()], tmp_path / "corpus", 20)
    assert corpus.tokens < TOKENS_PER_WORKER
    assert Word2Vec(corpus, EmbedConfig(epochs=1), workers=8).workers == 1


def test_an_empty_corpus_is_refused_with_a_reason(tmp_path: Path) -> None:
    corpus = write_corpus([], tmp_path / "corpus", 5)
    with pytest.raises(
        InputError,
        match=r"nothing to train song embeddings on: no song occurs 1 times .*; raise --session-gap-minutes",
    ):
        Word2Vec(corpus, EmbedConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"epochs": 0},
        {"workers": -1},
        {"learning_rate": 0.0},
        {"learning_rate": 1e39},  # infinite as a float32, on which gensim crashes
        {"ns_exponent": 1000.0},
        {"session_gap_minutes": 0.0},
        {"source": "x"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        EmbedConfig(**wrong)


def test_settings_load_without_gensim() -> None:
    code = "import sys, rayrec.embeddings.word2vec; sys.exit('gensim' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
