"""The whole way on generated plays, small enough to watch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.synthetic import GenerateConfig
from rayrec.errors import InputError, NotFoundError
from rayrec.evaluation.report import read_figures
from rayrec.jobs.fit import example_answer
from rayrec.jobs.pipeline import Outcome, run
from rayrec.recommend.answer import Answer
from rayrec.storage import artifacts
from rayrec.storage.locking import writes
from rayrec.storage.releases import default_parts
from rayrec.storage.workspace import Workspace

# Small enough to watch, a minute of training on two cores; few songs, so that each is played often
# enough for the network to learn what follows it in which context.
PIPELINE: dict[str, dict[str, Any]] = {
    "generate": {
        **{"users": 3_000, "songs": 400, "artists": 50, "genres": 8, "plays": 60.0, "buckets": 4},
        **{"follow": 0.5, "zipf": 1.3},
    },
    "split": {"test_days": 20.0, "validation_days": 7.0},
    "embed": {"dim": 32, "epochs": 10},
    "train": {
        **{"hidden_dim": 96, "negatives": 256, "batch": 16, "learning_rate": 0.005, "epochs": 10},
        "workers": 0,  # in this process: starting Ray Train's workers takes half as long as the training
    },
    "retrieval": {},
    "rank": {},
    "taste": {},
    "index": {},
    "evaluate": {"bootstrap_samples": 200, "max_curve_users": 500},
    "release": {},
}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo shows."""

    outcomes: list[Outcome]
    evaluation: dict[str, Any]  # what `read_figures` gives
    report: str  # path of report.html
    user: str
    answer: Answer

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "stages": [outcome.to_mapping() for outcome in self.outcomes],
            "default": self.evaluation["default"],
            "results": self.evaluation["results"],
            "report": self.report,
            "user": self.user,
            **self.answer.to_mapping(),
        }


@writes("demo")
def demo(
    workspace: Workspace, *, force: bool = False, on_stage: Callable[[Outcome], None] = lambda outcome: None
) -> Demo:
    """Generate plays, run every stage, recommend to one user as if three minutes after the last play.

    In a workspace that holds the demo already the stages are skipped, as in every other run: the
    plays come from a seed, so doing it all again would show the same figures. `force` does it again.
    Raises `InputError` in a workspace that holds other data, which it never replaces.
    """
    _require_room(workspace)
    outcomes = run(workspace, PIPELINE, force=force, on_stage=on_stage)
    ids = {outcome.stage: outcome.id for outcome in outcomes}
    user, shown = example_answer(workspace, default_parts(workspace, ids["train"]), k=10)
    report = artifacts.load_manifest(workspace, "reports", ids["evaluate"])
    return Demo(
        outcomes=outcomes,
        evaluation=read_figures(workspace, report),
        report=workspace.full(report.path("report.html")),
        user=user,
        answer=shown,
    )


def _require_room(workspace: Workspace) -> None:
    try:
        manifest = Dataset(workspace).manifest
    except NotFoundError:
        return
    if manifest.source != "generated" or manifest.config != to_mapping(GenerateConfig(**PIPELINE["generate"])):
        raise InputError(
            f"workspace {workspace.uri} holds another data set ({manifest.source}, {manifest.plays:,} plays); "
            "run the demo in its own workspace: rayrec --workspace ./demo demo"
        )
