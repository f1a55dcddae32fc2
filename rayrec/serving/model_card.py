"""The card of a release: what it was made from, and what its last evaluation says."""

from importlib.metadata import version

from rayrec.errors import NotFoundError
from rayrec.evaluation.report import PAGE, RESULTS, verdict
from rayrec.serving.schemas import DataSummary, ModelCard
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest, read_dataset_manifest
from rayrec.storage.releases import VALIDATION
from rayrec.storage.workspace import Workspace

REPORTS = "reports"
ORDERING_PARTS = ("models", "retrieval", "rankers")  # kinds of parts that make the order of an answer
METRICS = ("served_recall@", "served_mrr@", "recall@", "mrr@")


def model_card(workspace: Workspace, release: Manifest) -> ModelCard:
    """The card of a release. The figures are those of its last report, else of the validation before its last fit."""
    dataset = read_dataset_manifest(workspace)
    timed = dataset.times == "real" and dataset.plays > 0
    report = report_of(workspace, release)
    validation = release.metrics.get(VALIDATION, {})
    metrics = report.metrics if report else validation.get("figures", {})
    return ModelCard(
        release=release.id,
        created_at=release.created_at,
        version=version("rayrec"),
        parts=release.inputs,
        data=DataSummary(
            id=dataset.id,
            source=dataset.source,
            users=dataset.users,
            plays=dataset.plays,
            songs=dataset.songs,
            first_play=dataset.first_play if timed else None,
            last_play=dataset.last_play if timed else None,
        ),
        report=report.id if report else None,
        verdict=_verdict(workspace, report) if report else validation.get("verdict"),
        metrics={name: value for name, value in metrics.items() if name.startswith(METRICS)},
        queries=metrics.get("plays", metrics.get("pairs", validation.get("queries"))),
        warning=metrics.get("warning"),
    )


def report_page(workspace: Workspace, release: Manifest) -> bytes:
    """The HTML of a release's last report. Raises `NotFoundError` where it has none."""
    report = report_of(workspace, release)
    if report is None:
        raise NotFoundError(f"release {release.id} was not evaluated; run `rayrec evaluate`")
    return workspace.read_bytes(report.path(PAGE))


def report_of(workspace: Workspace, release: Manifest) -> Manifest | None:
    """The last evaluation of what a release answers with; None where there is none."""

    def is_about(report: Manifest) -> bool:
        return all(report.inputs.get(kind) == release.inputs.get(kind) for kind in ORDERING_PARTS)

    return artifacts.latest(workspace, REPORTS, is_about)


def _verdict(workspace: Workspace, report: Manifest) -> str:
    return verdict(workspace.read_json(report.path(RESULTS)), report.metrics["default"])
