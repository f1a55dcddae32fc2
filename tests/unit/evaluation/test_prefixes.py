"""Pairs of prefix and target: how lines read, and that the figures are those worked out by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayrec.errors import InputError
from rayrec.evaluation.prefixes import Prefixes, PrefixEvaluator, PrefixFile, parse_prefixes, read_prefixes
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.results import Figures
from rayrec.importing.readers.reader import byte_ranges
from rayrec.recommend.baselines import ItemKnnRecommender, PopularityRecommender

SONGS = pa.chunked_array([["a", "b"], ["c", "d"]])
TABS = PrefixFile(path="pairs.txt")


def _parse(lines: list[str], file: PrefixFile = TABS) -> Prefixes:
    return parse_prefixes(pa.array(lines, pa.string()), file, SONGS)


def test_lines_read_as_songs_three_minutes_apart_and_a_target() -> None:
    pairs = _parse(["a b\tc", "d\ta", "c x  a \ty", "\tb"])
    assert pairs.histories.offsets.tolist() == [0, 2, 3, 6, 6]
    assert pairs.histories.songs.tolist() == [0, 1, 3, 2, 4, 0]  # x is not in the catalog
    assert pairs.histories.played_at.tolist() == [0, 180_000, 0, 0, 180_000, 360_000]
    assert pairs.targets.tolist() == [2, 0, 4, 1]
    assert pairs.counts.tolist() == [4, 1, 1]


def test_other_separators_are_told() -> None:
    file = PrefixFile(path="p", item_separator=":", target_separator=" > ")
    pairs = _parse(["a:b > c"], file)
    assert (pairs.histories.songs.tolist(), pairs.targets.tolist()) == ([0, 1], [2])
    alike = _parse(["a,b,c"], PrefixFile(path="p", item_separator=" ", target_separator=","))
    assert (alike.histories.songs.tolist(), alike.targets.tolist()) == ([4], [2])  # the last one is the target


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"item_separator": ""}, "item_separator is empty"),
        ({"target_separator": ""}, "target_separator is empty"),
        ({"item_separator": "\\t"}, "both separators are '\\\\t'"),
    ],
)
def test_separators_must_tell_songs_apart(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrefixFile(path="p", **settings)


def test_a_line_without_a_target_is_refused_by_its_text() -> None:
    with pytest.raises(InputError, match=r"pairs.txt has a line without .* before a target: 'a b c'"):
        _parse(["a\tb", "a b c"])


def test_shards_of_a_file_hold_every_pair_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    lines = [f"{'abcd'[row % 4]} {'abcd'[row % 3]}\t{'abcdx'[row % 5]}" for row in range(40)]
    path.write_text("\ufeff" + "\r\n".join([*lines[:20], "", *lines[20:]]))
    units = byte_ranges(str(path), path.stat().st_size, 50)
    assert len(units) > 3
    pairs = [pairs for unit in units for pairs in read_prefixes(unit, TABS, SONGS)]
    expected = _parse(lines)
    assert sum(one.counts for one in pairs).tolist() == [40, 8, 0]
    np.testing.assert_array_equal(np.concatenate([one.targets for one in pairs]), expected.targets)
    np.testing.assert_array_equal(np.concatenate([one.histories.songs for one in pairs]), expected.histories.songs)


def test_figures_are_those_worked_out_by_hand_and_unknown_songs_are_misses() -> None:
    # b is the most popular, then a; c is in the catalog without a play, d rare. x is nowhere.
    plays = np.array([3, 5, 0, 1])
    popular = PopularityRecommender(np.array([3, 5, 9, 1]))
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], dtype=np.float32)
    models = [popular, ItemKnnRecommender(vectors)]
    config = EvaluateConfig(ks=(1, 2), bootstrap_samples=50)
    evaluator = PrefixEvaluator(models, song_plays=plays, config=config)
    sums = evaluator(_parse(["a\tb", "a\ta", "b\tc", "b\tx", "x\tb"]))
    values = {
        (row["model"], row["metric"], row["k"]): row["value"]
        for row in Figures(sums, models, config).results(["next"])
        if row["users"] == "all"
    }
    # Popularity ranks c, b, a, d: b is second twice. Neighbours of a: a, b, c, d; of what is unknown: nothing.
    assert values["popularity", "recall", 1] == 0
    assert values["popularity", "recall", 2] == pytest.approx(2 / 5)
    assert values["popularity", "mrr", 2] == pytest.approx(1 / 5)
    assert values["item-knn", "recall", 1] == pytest.approx(1 / 5)
    assert values["item-knn", "recall", 2] == pytest.approx(2 / 5)
    assert values["item-knn", "ndcg", 2] == pytest.approx((1 + 1 / np.log2(3)) / 5, abs=1e-6)
    # As served without the song of the prefix: b is found by popularity after a and after x, by neighbours after a.
    differences = {
        (entry["target"], entry["metric"]): entry["difference"]
        for entry in Figures(sums, models, config).comparisons("item-knn")
    }
    assert differences == {
        ("served", "recall"): -0.25,
        ("served", "mrr"): 0,
        ("next", "recall"): 0,
        ("next", "mrr"): pytest.approx(0.1),
    }
    found = {
        row["model"]: row["value"]
        for row in Figures(sums, models, config).results(["served"])
        if (row["users"], row["metric"], row["k"]) == ("all", "recall", 2)
    }
    assert found == {"popularity": 2 / 4, "item-knn": 1 / 4}
