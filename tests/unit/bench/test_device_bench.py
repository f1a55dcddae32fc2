"""The device benchmark, without Ray: what it counts and prints, and that a GPU computes the same as a CPU."""

import json
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch

from rayrec.bench import device_bench
from rayrec.bench.device_bench import ByteCounter, Size, network, random_histories
from rayrec.compat import observed_operations
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.train_config import Cell, Objective, TrainConfig
from rayrec.model.training import TrainingStep

REPORT = {"name": "a card", "torch": "2", "runs": [], "reading_plays_per_second": [1.0, 1.0]}
UNCOMPILED = ((False, False), (True, False))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(device_bench, "PRODUCT_ROWS", {"cpu": 64, "cuda": 512})
    monkeypatch.setattr(device_bench, "COPY_BYTES", {"cpu": 1 << 16, "cuda": 1 << 24})
    monkeypatch.setattr(device_bench, "BATCHES", (1, 2))


def test_each_run_is_reported_with_its_shares_of_the_limits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_bench, "WAYS", UNCOMPILED)
    device_bench.main(["--device", "cpu", "--quick", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [(run["bfloat16"], run["work"], run["batch"]) for run in report["runs"]] == [
        (bf16, work, batch) for bf16 in (False, True) for work in ("train", "tastes") for batch in (1, 2)
    ]
    for run in report["runs"]:
        limit = report["limits"]["bfloat16_flops" if run["bfloat16"] else "float32_flops"]
        assert run["plays_per_second"] > 0
        assert run["share_of_flops"] == pytest.approx(run["plays_per_second"] * run["flops_per_play"] / limit)
        bytes_per_second = run["plays_per_second"] * run["unfused_bytes_per_play"]
        assert run["share_of_bytes"] == pytest.approx(bytes_per_second / report["limits"]["bytes_per_second"])
        if run["work"] == "train":
            reading_rate = report["reading_plays_per_second"][run["batch"] - 1]
            assert run["read_over_trained"] == pytest.approx(reading_rate / run["plays_per_second"])
    small_flops, large_flops = (run["flops_per_play"] for run in report["runs"][:2])
    assert large_flops > small_flops  # the larger batch has more negatives
    table = device_bench.as_table(report)
    lines = [line.split() for line in table.splitlines() if line.startswith(("train ", "tastes "))]
    assert [line[:3] for line in lines] == [
        [run["work"], f"x{run['batch']}", "bfloat16" if run["bfloat16"] else "float32"] for run in report["runs"]
    ]
    assert lines[0][-1] == f"{report['runs'][0]['read_over_trained']:.2f}"
    assert table.count(" same as on a CPU ") == len(report["checks"]) == 16
    assert {(check["cell"], check["objective"], check["bfloat16"]) for check in report["checks"]} == set(
        product(get_args(Cell), get_args(Objective), (False, True))
    )
    assert "steps copied ahead of time are complete" in table


def test_a_larger_batch_has_more_negatives_by_its_root_and_larger_passes() -> None:
    default, larger = Size().times(1), Size().times(16)
    assert (default.config.batch, larger.config.batch) == (64, 1024)
    assert [round(size.config.negatives * size.config.scale) for size in (default, larger)] == [1024, 4096]
    assert larger.plays_per_pass == 16 * default.plays_per_pass


@pytest.mark.parametrize(("call", "number", "bf16"), [(5, 2, False), (6, 3, True)])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_device_with_other_results_is_reported_by_name_and_exit_code(
    call: int,
    number: int,
    bf16: bool,
    form: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_network, call_count = device_bench.train_network, [0]

    def train_with_fault(size: Size, device: str, steps: int, **options: bool) -> TasteModel:
        call_count[0] += 1
        model = train_network(size, device, steps, **options)
        if call_count[0] == call:  # training on the device, second objective of the first cell, either precision
            assert options == {"bf16": bf16}
            with torch.no_grad():
                model.dense.weight += 0.1
        return model

    monkeypatch.setattr(device_bench, "train_network", train_with_fault)
    checks = device_bench.checks("cpu")
    assert [position for position, check in enumerate(checks) if not check["same"]] == [number]
    assert (checks[number]["cell"], checks[number]["objective"]) == ("gru", "softmax")
    monkeypatch.setattr(device_bench, "measure_device", lambda *_: {**REPORT, "checks": checks, "copies_whole": True})
    with pytest.raises(SystemExit) as stopped:
        device_bench.main(["--device", "cpu", *form])
    assert stopped.value.code == 1
    if not form:
        precision = "bfloat16 " if bf16 else "float32  "
        assert f"gru   softmax          {precision} NOT THE SAME AS ON A CPU" in capsys.readouterr().out


def test_steps_that_are_copied_incompletely_are_reported_by_name_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device_bench.check_copies("cpu", Size.quick())

    def incomplete_step(step: TrainingStep, device: torch.device, copies: torch.cuda.Stream | None) -> TrainingStep:
        return replace(step, averaged_BL=torch.zeros_like(step.averaged_BL)) if step.number == 3 else step

    monkeypatch.setattr(TrainingStep, "to", incomplete_step)
    assert not device_bench.check_copies("cpu", Size.quick())
    monkeypatch.setattr(device_bench, "measure_device", lambda *_: {**REPORT, "checks": [], "copies_whole": False})
    with pytest.raises(SystemExit) as stopped:
        device_bench.main(["--device", "cpu"])
    assert stopped.value.code == 1
    assert "steps copied ahead of time are NOT COMPLETE" in capsys.readouterr().out


def test_compiled_runs_that_would_begin_too_late_are_left_out_with_a_line_that_says_so() -> None:
    report = device_bench.measure_device("cpu", replace(Size.quick(), compile_until=0.0))
    assert {run["compiled"]: set(run) & {"plays_per_second", "error"} for run in report["runs"]} == {
        False: {"plays_per_second"},
        True: {"error"},
    }
    late_runs = [run for run in report["runs"] if run["compiled"]]
    assert len(late_runs) == len(report["runs"]) / 2 == 8
    assert not any(run["compiled"] for run in report["runs"][:8])  # plain runs come first: they are always measured
    assert device_bench.as_table(report).count("skipped: 0 seconds had passed") == 8


def test_a_run_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_compile(network: TasteModel, **_: Any) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(device_bench, "WAYS", ((False, True), (False, False)))
    monkeypatch.setattr(TasteModel, "compile", fail_to_compile)
    runs = device_bench.measure_device("cpu", Size.quick())["runs"]
    compiled, plain = (next(run for run in runs if run["compiled"] == choice) for choice in (True, False))
    assert compiled == {"work": "train", "bfloat16": False, "compiled": True, "batch": 1, "error": "no C++ compiler"}
    assert plain["plays_per_second"] > 0


def test_bytes_are_those_read_and_those_written() -> None:
    values, target = torch.ones(1000), torch.empty(1000)
    for work, expected in (
        (lambda: torch.add(values, values), 12_000),
        (lambda: torch.add(values, values, out=target), 12_000),
        (lambda: target.mul_(2.0), 8_000),
        (lambda: torch.empty_like(values), 0),
        (lambda: values[:10].view(2, 5), 0),
    ):
        counter = ByteCounter()
        with observed_operations(counter.add):
            work()
        assert counter.total == expected


def test_the_operations_of_a_play_are_those_of_its_matrices() -> None:
    """All histories have one length, so that nothing is padded. The matrix products are counted by hand."""
    size = replace(Size.quick(), users=4)
    size = replace(size, config=size.config.replace(averages=()))
    config, histories = size.config, random_histories(size)
    encoder = TasteEncoder(network(size))

    def work() -> float:
        encoder.run(histories)
        return float(histories.num_plays)

    flops, moved_bytes = device_bench.cost_per_unit(work)
    hidden, features = config.hidden_dim, encoder.model.config.features.dim
    assert flops == pytest.approx(2 * 3 * hidden * (size.dim + features + hidden), rel=0.01)
    assert moved_bytes > 4 * (size.dim + hidden)


def test_work_a_second_counts_all_calls_but_the_first() -> None:
    calls: list[float] = []

    def work() -> float:
        calls.append(1.0)
        return 100.0

    rate = device_bench.per_second(work, torch.device("cpu"), 0.05)
    assert len(calls) > device_bench.WARM_CALLS
    assert rate <= 100.0 * (len(calls) - device_bench.WARM_CALLS) / 0.05


def test_random_histories_are_the_same_each_time() -> None:
    first, second = random_histories(Size.quick()), random_histories(Size.quick())
    np.testing.assert_array_equal(first.songs, second.songs)
    assert first.songs.max() < Size.quick().songs
    assert (np.diff(first.played_at) > 0).all()


@pytest.mark.slow
def test_a_compiled_training_takes_the_steps_of_one_that_is_not_compiled() -> None:
    """Without dropout, because compiled code may draw other random numbers."""
    size = replace(Size.quick(), config=Size.quick().config.replace(dropout=0.0))
    plain, compiled = (
        device_bench.train_network(replace(size, config=size.config.replace(compiled=choice)), "cpu", 3)
        for choice in (False, True)
    )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, atol=1e-6, rtol=0, msg=name)


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: run it on a machine with CUDA and a build of torch for it",
)
class TestOnAGpu:
    def test_tastes_are_those_of_a_cpu(self) -> None:
        """This includes songs that were added after the training."""
        size = Size.quick()
        histories = random_histories(replace(size, songs=size.songs + 20))
        added_songs, vectors = torch.arange(size.songs, size.songs + 20), torch.eye(20, size.dim)
        assert (histories.songs >= size.songs).any()
        tastes = {}
        for device in ("cpu", "cuda"):
            model = network(size)
            model.add_songs(added_songs, vectors, vectors)
            encoder = TasteEncoder(model, device)
            _, states = encoder.run(histories)
            tastes[device] = encoder.tastes(states, int(histories.played_at.max()), "short")
        np.testing.assert_allclose(tastes["cuda"], tastes["cpu"], atol=1e-3)  # cuDNN computes in TF32

    @pytest.mark.parametrize("bf16", [False, True])
    def test_a_training_takes_the_steps_of_a_cpu(self, bf16: bool) -> None:
        size = replace(Size.quick(), config=Size.quick().config.replace(dropout=0.0))
        gpu_weights = device_bench.train_network(size, "cuda", 3, bf16=bf16).state_dict()
        cpu_weights = device_bench.train_network(size, "cpu", 3).state_dict()
        weight_change = TrainConfig().learning_rate * 3  # Adam moves a weight by about the learning rate per step
        for name, value in cpu_weights.items():
            assert (gpu_weights[name] - value).abs().mean() < 0.2 * weight_change, name

    def test_the_benchmark_runs_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(device_bench, "WAYS", UNCOMPILED)
        report = device_bench.measure_device("cuda", Size.quick())
        assert all(run["plays_per_second"] > 0 for run in report["runs"])
        assert report["copies_whole"]
        assert all(check["same"] for check in report["checks"])
