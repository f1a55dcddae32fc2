"""Reports about the parts of a release, of planted figures."""

from rayrec.evaluation.report import write_report
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.workspace import Workspace


def plant_report(
    workspace: Workspace, parts: dict[str, str], *, recall: float = 0.42, report_id: str = "planted"
) -> None:
    """A report that says recall@20 as served is `recall`, MRR@20 is 0.2, and that the test range leaked."""
    about = {"model": "two-step", "kind": "network", "users": "all", "target": "served", "k": 20}
    values = {"recall": recall, "mrr": 0.2}
    rows = [
        {**about, "metric": metric, "value": value, "low": value - 0.01, "high": value + 0.01, "plays": 9}
        for metric, value in values.items()
    ]
    metrics = {"default": "two-step", "served_recall@20": recall, "served_mrr@20": 0.2, "plays": 9}
    metrics |= {"warning": "the test range leaked"}
    manifest = Manifest(kind="reports", id=report_id, inputs=dict(parts), metrics=metrics)
    names = write_report(workspace, manifest.folder, {"results": rows}, default="two-step", about={})
    publish(workspace, manifest, names)
