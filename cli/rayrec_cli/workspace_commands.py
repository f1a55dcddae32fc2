"""status, verify: what the workspace holds, and whether it is intact."""

from typing import Any

from rich.console import RenderableType

from rayrec.data.status import KINDS
from rayrec.data.status import status as look
from rayrec_cli.app import app
from rayrec_cli.options import Call, command
from rayrec_cli.output import Shown, day, figures, number, size, table

HEADLINES = (
    "validation_recall@20",
    "recall@20",
    "coverage",
    "mean_cosine",
    "kind",
    "recall",
    "users",
)  # of any kind of artifact


@command(app, "status", example="rayrec status")
def status(call: Call) -> Shown:
    """Show what the workspace holds."""
    data = look(call.workspace)
    dataset = data["dataset"]
    if dataset is None:
        views: list[RenderableType] = [f"Workspace {data['workspace']} holds no data set; see rayrec import --help."]
    else:
        names = ("id", "source", "plays", "users", "songs", "playlists", "rejected")
        shown = {name: dataset[name] for name in names} | {"size": size(dataset["bytes"])}
        views = [figures(f"Workspace {data['workspace']}", shown)]
    rows = [["split", split["id"], "", "", split.get("protocol", "")] for split in data["splits"]]
    for kind in KINDS:
        for item in data[kind]:
            state = "live" if item["id"] == data["active"] else _headline(item["figures"])
            rows.append([kind, item["id"], size(item["bytes"]), day(item["created_at"]), state])
    if rows:
        views.append(table("", ["kind", "id", "size", "created (UTC)", "figures"], rows, left=["id", "figures"]))
    return Shown(data, views)


@command(app, "verify", example="rayrec verify")
def verify_workspace(call: Call) -> Shown:
    """Verify the integrity of the workspace.

    Compares every file with its checksum and checks its content: each user once, vectors finite and normalized,
    the index equal to its model, releases complete. Exit code 0 if no problem is found, 1 otherwise.
    """
    from rayrec.jobs.verifying.verify import verify_workspace as job

    audit = job(call.workspace)
    rows = [[item.kind, item.id, item.files, item.problems or "ok"] for item in audit.checked]
    views: list[Any] = [table("Checked", ["kind", "id", "files", "problems"], rows, left=["id"])]
    for title, findings in (("Problems", audit.problems), ("Notes", audit.notes)):
        if findings:
            views.append("\n".join([f"{title}:", *(f"  {each.path} {each.text}" for each in findings)]))
    views.append("No problems found." if audit.is_sound else f"{len(audit.problems)} problems found.")
    return Shown(audit.to_mapping(), views, exit_code=0 if audit.is_sound else 1)


def _headline(values: dict[str, Any]) -> str:
    """The main metrics of an artifact."""
    found = [f"{name.replace('_', ' ')} {number(values[name])}" for name in HEADLINES if name in values]
    return ", ".join(found)
