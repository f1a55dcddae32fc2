"""Taste vectors continued from a stored state equal those computed from all plays, at the cost of the new plays."""

import numpy as np
import pyarrow as pa
import pytest
from networks import MINUTE, NUM_SONGS, model_config, network
from worlds import random_histories, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.errors import DamagedArtifactError
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import Counts, continued_tables, full_tables
from rayrec.model.train_config import Cell, FeatureSpec
from rayrec.storage.workspace import Workspace, histories_file

AT = 400 * MINUTE


def add_part(dataset: Dataset, histories: Histories) -> Dataset:
    """Add `histories` as one more part to a data set of one bucket, and return the data set."""
    part = dataset.manifest.parts
    histories = histories.take(histories.lengths > 0)
    ordered = histories.take(np.argsort(histories.user_ids))
    dataset.workspace.write_table(histories_file(part, 0), ordered.to_arrow())
    object.__setattr__(dataset.manifest, "parts", part + 1)
    return dataset


def later_plays(histories: Histories, names: list[str], *, from_minute: int, seed: int) -> Histories:
    """New plays of the users `names`, from `from_minute` on."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, size=len(names))
    return Histories.from_lists(
        songs=[random.integers(0, NUM_SONGS + 5, size=length) for length in lengths],  # type: ignore[misc]
        played_at=[from_minute * MINUTE + np.arange(length) * MINUTE for length in lengths],  # type: ignore[misc]
        user_ids=names,
    )


def rows_by_user(tables: list[pa.Table]) -> dict[str, dict]:
    rows = pa.concat_tables(tables).to_pylist()
    assert len({row["user_id"] for row in rows}) == len(rows)
    return {row["user_id"]: row for row in rows}


def assert_equal_rows(actual: list[pa.Table], expected: list[pa.Table]) -> None:
    actual_rows, expected_rows = rows_by_user(actual), rows_by_user(expected)
    assert actual[0].schema.equals(expected[0].schema)
    assert list(actual_rows) == list(expected_rows)
    for user, row in expected_rows.items():
        for name, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], float):
                np.testing.assert_allclose(actual_rows[user][name], value, atol=2e-6, err_msg=f"{user} {name}")
            else:
                assert actual_rows[user][name] == value, (user, name)


@pytest.fixture
def grown(workspace: Workspace) -> tuple[Dataset, Histories]:
    """A data set of one part, and the histories in it."""
    histories = random_histories(40, NUM_SONGS, seed=5)
    histories = histories.take(histories.lengths > 0)
    histories = histories.take(np.argsort(histories.user_ids))
    return write_dataset(workspace, histories, NUM_SONGS, buckets=1), histories


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("users", [1, 6, 1_000])
def test_rows_equal_a_full_run_and_each_user_is_in_the_right_count(
    grown: tuple[Dataset, Histories], cell: Cell, users: int
) -> None:
    dataset, histories = grown
    features = FeatureSpec(gap=True, hour=True, pause_hours=0.05)
    encoder = TasteEncoder(network(model_config(layers=2, cell=cell, features=features)))
    base = list(full_tables(encoder, dataset, 0, at=AT - MINUTE, users=7, counts=Counts()))
    names = list(histories.user_ids)
    add_part(dataset, later_plays(histories, [*names[3:20:2], "new-a"], from_minute=300, seed=1))
    add_part(dataset, later_plays(histories, [names[3], names[30], "new-b", "new-a"], from_minute=350, seed=2))
    # older than the stored state
    add_part(dataset, later_plays(histories, [names[5], names[31]], from_minute=-5, seed=3))

    counts, full_counts = Counts(), Counts()
    tables = list(continued_tables(encoder, dataset, 0, base, first_part=1, at=AT, users=users, counts=counts))
    expected = list(full_tables(encoder, dataset, 0, at=AT, users=1_000, counts=full_counts))
    assert_equal_rows(tables, expected)
    assert (counts.new, counts.continued, counts.recomputed) == (2, 9, 2)
    assert counts.unchanged == len(names) - 11
    assert counts.plays_computed < full_counts.plays_computed


def test_only_the_new_plays_go_through_the_network(grown: tuple[Dataset, Histories]) -> None:
    dataset, histories = grown
    encoder = TasteEncoder(network())
    base = list(full_tables(encoder, dataset, 0, at=AT, users=7, counts=Counts()))
    new_plays = later_plays(histories, [histories.user_ids[4], "new"], from_minute=300, seed=1)
    add_part(dataset, new_plays)
    opened_paths: list[str] = []
    open_input = Workspace.open_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "open_input", lambda self, path: opened_paths.append(path) or open_input(self, path))
        counts = Counts()
        list(continued_tables(encoder, dataset, 0, base, first_part=1, at=AT, users=7, counts=counts))
    assert counts.plays_computed == new_plays.num_plays
    assert not [path for path in opened_paths if "part=0000" in path]


def test_without_new_plays_vectors_are_those_of_the_new_moment(grown: tuple[Dataset, Histories]) -> None:
    dataset, _ = grown
    encoder = TasteEncoder(network())
    base = list(full_tables(encoder, dataset, 0, at=AT, users=7, counts=Counts()))
    counts = Counts()
    tables = list(continued_tables(encoder, dataset, 0, base, first_part=1, at=2 * AT, users=5, counts=counts))
    assert_equal_rows(tables, list(full_tables(encoder, dataset, 0, at=2 * AT, users=9, counts=Counts())))
    assert counts == Counts(unchanged=sum(table.num_rows for table in base))
    assert not tables[0].column("taste_short").equals(base[0].slice(0, 5).column("taste_short"))


def test_plays_at_the_time_of_the_last_stored_play_continue_its_state(grown: tuple[Dataset, Histories]) -> None:
    dataset, histories = grown
    encoder = TasteEncoder(network())
    base = list(full_tables(encoder, dataset, 0, at=AT, users=7, counts=Counts()))
    last_played_at = int(histories.played_at[histories.offsets[1] - 1])
    add_part(dataset, Histories.from_lists([[3]], [[last_played_at]], [histories.user_ids[0]]))
    counts = Counts()
    tables = list(continued_tables(encoder, dataset, 0, base, first_part=1, at=AT, users=7, counts=counts))
    assert counts.continued == 1
    assert_equal_rows(tables, list(full_tables(encoder, dataset, 0, at=AT, users=7, counts=Counts())))


def test_rows_in_another_order_are_refused(grown: tuple[Dataset, Histories]) -> None:
    dataset, histories = grown
    encoder = TasteEncoder(network())
    (base,) = full_tables(encoder, dataset, 0, at=AT, users=1_000, counts=Counts())
    add_part(dataset, later_plays(histories, list(histories.user_ids[:9]), from_minute=300, seed=1))
    reversed_table = base.take(pa.array(np.arange(len(base))[::-1].copy()))
    with pytest.raises(DamagedArtifactError, match="rayrec taste --full"):
        list(
            continued_tables(
                encoder,
                dataset,
                0,
                [reversed_table.slice(start, 3) for start in range(0, len(base), 3)],
                first_part=1,
                at=AT,
                users=2,
                counts=Counts(),
            )
        )
