"""Evaluate the network and the baselines on given pairs of prefix and target, shard by shard of the file on Ray."""

import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from rayrec.config import to_mapping
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split
from rayrec.errors import InputError
from rayrec.evaluation.accumulator import MetricAccumulator
from rayrec.evaluation.bootstrap import CellRange, cell_ranges
from rayrec.evaluation.prefixes import PrefixEvaluator, PrefixFile, read_prefixes
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import SONG_EMBEDDINGS, headline, write_report
from rayrec.evaluation.results import Figures, settings_of
from rayrec.importing.readers.files import find_files
from rayrec.importing.readers.lines import byte_ranges
from rayrec.importing.readers.reader import Unit
from rayrec.jobs.compared_models import choose, make_recommenders
from rayrec.jobs.evaluate import KIND, health_of
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.progress import progress
from rayrec.storage.artifacts import Manifest, fingerprint, new_id, publish, reuse
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace

UNIT_BYTES = 1 << 18  # of the file that one task reads
DESCRIBED = "The target of each line of the file is predicted from the songs of its prefix; there are no times."


@writes("evaluate --prefixes")
def evaluate_prefixes(
    workspace: Workspace,
    config: EvaluateConfig,
    file: PrefixFile,
    *,
    split: Split | None = None,
    model_id: str | None = None,
    repeat: bool = False,
) -> Manifest:
    """Write reports/<id>/ about the models of `config` on the pairs of a file.

    Models are those made for `split`, or without one those made of all plays, and baselines are
    fitted likewise. The manifest's metrics hold default, its headline, pairs, unknown_targets (misses, all
    of them), unknown_items and seconds; results (users all, targets served and next), comparisons and the health of
    the song vectors are in results.json, see `read_figures`.

    Raises `InputError` for a file without pairs or with a line that cannot be read, else as `evaluate`.
    """
    started = time.monotonic()
    if config.queries:
        raise InputError("--queries draws from the test range of a split; the pairs of a file are all evaluated")
    dataset = Dataset(workspace)
    (found,) = find_files([file.path], ["*"])[:1]
    compared = choose(workspace, dataset, config, split, model_id)
    settings = {**to_mapping(config), "prefixes": {**asdict(file), "size": found.size, "changed": found.changed}}
    report_id, complete = new_id(
        workspace, KIND, fingerprint("evaluate prefixes", settings, compared.inputs), repeat=repeat
    )
    if complete:
        return reuse(workspace, KIND, report_id)
    recommenders, song_plays = make_recommenders(workspace, dataset, compared, split)
    evaluator = PrefixEvaluator(recommenders, song_plays=song_plays, config=config)
    sums, counts = evaluate_pairs(workspace, evaluator, file, byte_ranges(found.source, found.size, UNIT_BYTES))
    if not counts[0]:
        raise InputError(f"{file.path} has no pairs; expected lines of songs, a tab and the next song")
    made = Figures(sums, recommenders, config)
    results = [entry for entry in made.results(["served", "next"]) if entry["users"] == "all"]
    figures = {
        "settings": settings_of(recommenders),
        "results": [{name: value for name, value in entry.items() if name != "users_count"} for entry in results],
        "comparisons": made.comparisons(compared.default),
        SONG_EMBEDDINGS: health_of(dataset, compared, song_plays),
    }
    pairs = dict(zip(("pairs", "unknown_targets", "unknown_items"), counts.tolist(), strict=True))
    seconds = round(time.monotonic() - started, 1)
    manifest = Manifest(
        kind=KIND,
        id=report_id,
        config=settings,
        inputs=compared.inputs,
        seed=config.seed,
        metrics={
            "default": compared.default,
            "protocol": "prefixes",
            **headline(figures, compared.default),
            **pairs,
            "seconds": seconds,
        },
    )
    about = {"protocol": "prefixes", "file": file.path, **{name: f"{count:,}" for name, count in pairs.items()}}
    about |= compared.inputs
    names = write_report(
        workspace, manifest.folder, figures, default=compared.default, about=about, described=DESCRIBED
    )
    return publish(workspace, manifest, names)


def evaluate_pairs(
    workspace: Workspace, evaluator: PrefixEvaluator, file: PrefixFile, units: Sequence[Unit]
) -> tuple[MetricAccumulator, np.ndarray]:
    """The sums and the counts, as in `Prefixes`, of all units, spread over the cluster."""
    sums, counts = evaluator.empty(), np.zeros(3, dtype=np.int64)
    ranges = cell_ranges(len(units), evaluator.cells_at_once)
    tasks = len(units) * len(ranges)
    with ray_cluster(), progress("evaluate", tasks) as bar:
        arguments = {"workspace": workspace, "evaluator": evaluator, "file": file, "units": list(units)}
        for task, part, pairs in run_buckets(UnitEvaluator, range(tasks), arguments={**arguments, "ranges": ranges}):
            sums.add(part, first_cell=task * part.cells)
            counts += pairs
            bar.advance()
    return sums, counts


class UnitEvaluator:
    """Evaluates the pairs of some bootstrap cells of one unit of the file at a time."""

    def __init__(
        self,
        workspace: Workspace,
        evaluator: PrefixEvaluator,
        file: PrefixFile,
        units: Sequence[Unit],
        ranges: list[CellRange],
    ) -> None:
        self.evaluator, self.file, self.units, self.ranges = evaluator, file, units, ranges
        self.song_ids = Dataset(workspace).catalog().table.column(columns.SONG_ID)

    def __call__(self, task: int) -> tuple[int, MetricAccumulator, np.ndarray]:
        """The task, and the sums and counts of its pairs: those that begin in a unit, divided by ranges of cells."""
        unit, part = divmod(int(task), len(self.ranges))
        cells = self.ranges[part]
        sums, counts = self.evaluator.empty(cells.count), np.zeros(3, dtype=np.int64)
        for prefixes in read_prefixes(self.units[unit], self.file, self.song_ids):
            some = prefixes.take(np.flatnonzero(cells.holds(prefixes.histories.user_ids)))
            sums.add(self.evaluator(some, cells))
            counts += some.counts
        return int(task), sums, counts
