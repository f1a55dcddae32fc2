"""Judge the network and the baselines on given pairs of prefix and target, shard by shard of the file on Ray."""

import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from rayrec.config import to_mapping
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split
from rayrec.errors import InputError
from rayrec.evaluation.accumulator import Tally
from rayrec.evaluation.prefixes import PrefixEvaluator, PrefixFile, read_prefixes
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import SONG_VECTORS, headline, write_report
from rayrec.evaluation.results import comparisons_of, results_of
from rayrec.importing.readers.files import find_files
from rayrec.importing.readers.lines import byte_ranges
from rayrec.importing.readers.reader import Unit
from rayrec.jobs.buckets import run_buckets
from rayrec.jobs.cluster import ray_cluster
from rayrec.jobs.compared_models import choose, make_recommenders
from rayrec.jobs.evaluate import KIND, health_of
from rayrec.progress import progress
from rayrec.storage.artifacts import Manifest, fingerprint, load, new_id, publish
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace

UNIT_BYTES = 1 << 18  # of the file that one task reads
ASKED = "The target of each line of the file is predicted from the songs of its prefix; there are no times."

Tallied = tuple[Tally, np.ndarray]  # and the counts of `Prefixes`


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
    dataset = Dataset(workspace)
    (found,) = find_files([file.path], ["*"])[:1]
    judged = choose(workspace, dataset, config, split, model_id)
    settings = {**to_mapping(config), "prefixes": {**asdict(file), "size": found.size, "changed": found.changed}}
    report_id, complete = new_id(
        workspace, KIND, fingerprint("evaluate prefixes", settings, judged.inputs), repeat=repeat
    )
    if complete:
        return load(workspace, KIND, report_id)
    recommenders, song_plays = make_recommenders(workspace, dataset, judged, split)
    evaluator = PrefixEvaluator(recommenders, song_plays=song_plays, config=config)
    tally, counts = judge(workspace, evaluator, file, byte_ranges(found.source, found.size, UNIT_BYTES))
    if not counts[0]:
        raise InputError(f"{file.path} has no pairs; expected lines of songs, a tab and the song that followed")
    results = results_of(tally, recommenders, config, ["served", "next"])
    results = [entry for entry in results if entry["users"] == "all"]
    figures = {
        "results": [{name: value for name, value in entry.items() if name != "users_count"} for entry in results],
        "comparisons": comparisons_of(tally, recommenders, config, judged.default),
        SONG_VECTORS: health_of(dataset, judged, song_plays),
    }
    told = dict(zip(("pairs", "unknown_targets", "unknown_items"), counts.tolist(), strict=True))
    seconds = round(time.monotonic() - started, 1)
    manifest = Manifest(
        kind=KIND,
        id=report_id,
        config=settings,
        inputs=judged.inputs,
        seed=config.seed,
        metrics={
            "default": judged.default,
            "protocol": "prefixes",
            **headline(figures, judged.default),
            **told,
            "seconds": seconds,
        },
    )
    about = {"protocol": "prefixes", "file": file.path, **{name: f"{count:,}" for name, count in told.items()}}
    about |= judged.inputs
    names = write_report(workspace, manifest.folder, figures, default=judged.default, about=about, asked=ASKED)
    return publish(workspace, manifest, names)


def judge(workspace: Workspace, evaluator: PrefixEvaluator, file: PrefixFile, units: Sequence[Unit]) -> Tallied:
    """The tally and the counts of all units, spread over the cluster."""
    tally, counts = evaluator.empty(), np.zeros(3, dtype=np.int64)
    with ray_cluster(), progress("evaluate", len(units)) as bar:
        arguments = {"workspace": workspace, "evaluator": evaluator, "file": file, "units": list(units)}
        for more, found in run_buckets(UnitEvaluator, range(len(units)), arguments=arguments):
            tally, counts = tally + more, counts + found
            bar.advance()
    return tally, counts


class UnitEvaluator:
    """Judges one unit of the file at a time."""

    def __init__(
        self, workspace: Workspace, evaluator: PrefixEvaluator, file: PrefixFile, units: Sequence[Unit]
    ) -> None:
        self.evaluator, self.file, self.units = evaluator, file, units
        self.song_ids = Dataset(workspace).catalog().table.column(columns.SONG_ID)

    def __call__(self, unit: int) -> Tallied:
        """The tally and the counts of the pairs that begin in the unit."""
        tally, counts = self.evaluator.empty(), np.zeros(3, dtype=np.int64)
        for prefixes in read_prefixes(self.units[int(unit)], self.file, self.song_ids):
            tally, counts = tally + self.evaluator(prefixes), counts + prefixes.counts
        return tally, counts
