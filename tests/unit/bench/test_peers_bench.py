"""Our network compared with another library's: both answer the same queries and are measured by the same metrics."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import write_dataset

from rayrec.bench import peers_bench
from rayrec.bench.peers_bench import as_markdown, compare_epochs, queries_of_test_range, songs_before
from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.storage.workspace import Workspace

PYTHON = Path(__file__).parents[3] / ".venv-peers" / "bin" / "python"


class ImprovingModel:
    """A model whose answers are all wrong after its first epoch, and all right from its second epoch on."""

    def __init__(self, turns: list[str], name: str, targets: np.ndarray) -> None:
        self._turns, self._name, self._targets, self._epochs = turns, name, targets, 0

    def epoch(self) -> tuple[int, float]:
        self._turns.append(self._name)
        self._epochs += 1
        return 100, 2.0

    def answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = torch.eye(100)
        correct = vectors[torch.from_numpy(self._targets.astype(np.int64))]
        return (correct if self._epochs > 1 else 0.1 - correct), vectors


@pytest.fixture
def histories() -> Histories:
    return Histories.from_lists(
        [[1, 2, 3, 1, 4], [7], [9, 8, 9, 6]],
        [[10, 20, 30, 50, 60], [55], [10, 20, 51, 52]],
        user_ids=["a", "b", "c"],
    )


def test_queries_are_plays_of_the_test_range_that_follow_another_play(
    workspace: Workspace, histories: Histories
) -> None:
    dataset = write_dataset(workspace, histories, 10)
    split = Split(id="s", dataset="by-hand", validation_from=40, test_from=50)
    queries = queries_of_test_range(dataset, split, 10)
    assert sorted(queries.histories.songs[queries.plays].tolist()) == [1, 4, 6, 9]
    inputs = songs_before(queries, 3)
    parts = np.split(inputs["songs"], inputs["offsets"][1:-1])
    assert sorted(part.tolist() for part in parts) == [[1, 2, 3], [2, 3, 1], [9, 8], [9, 8, 9]]
    assert len(queries_of_test_range(dataset, split, 2).plays) == 2


def test_networks_train_by_turns_and_are_evaluated_after_each_epoch(workspace: Workspace, histories: Histories) -> None:
    dataset = write_dataset(workspace, histories, 10)
    queries = queries_of_test_range(dataset, Split(id="s", dataset="by-hand", validation_from=40, test_from=50), 10)
    targets, turns = queries.histories.songs[queries.plays], list[str]()
    epochs = compare_epochs({name: ImprovingModel(turns, name, targets) for name in ("ours", "theirs")}, queries, 3)
    assert turns == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert [epoch.epoch for epoch in epochs] == [1, 1, 2, 2, 3, 3]
    assert all(epoch.recall == epoch.served_recall == 0 for epoch in epochs[:2])
    assert all(epoch.mrr == epoch.served_mrr == 1 for epoch in epochs[2:])
    assert {epoch.plays_per_second for epoch in epochs} == {50.0}
    table = as_markdown(epochs).splitlines()
    assert table[4] == "| ours | 3 | 6 | 50 | 1.000 | 1.000 | 1.000 | 1.000 |"
    assert len(table) == 2 + 6


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no environment of RecTools: run `make bench-peers`")
def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    peers_bench.main(["--quick", "--json", "--python", os.fspath(PYTHON)])
    report = json.loads(capsys.readouterr().out)
    our_name, other_name = peers_bench.OURS, peers_bench.SASREC
    assert [epoch["model"] for epoch in report["epochs"]] == [our_name, other_name, other_name, our_name]
    assert all(epoch["plays_per_second"] > 0 and epoch["recall"] > 0 for epoch in report["epochs"])
    assert report["parameters"] > 0
