"""status, verify, unlock: what the workspace holds, whether it is intact, and who writes to it."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from rayrec.data.lineage import KINDS
from rayrec.data.lineage import status as look
from rayrec.storage.artifacts import noun
from rayrec.storage.locking import lock_holder, unlock
from rayrec_cli.app import Call, Shown, app, command, day, number, size, table

YesOption = Annotated[bool, typer.Option("--yes", help="Delete the lock; without it only show it.")]

# Main metrics of any kind of artifact, in the order of their importance.
HEADLINES = ("validation_recall@20", "recall@20", "coverage", "mean_cosine", "kind", "recall", "users")
# What an artifact stands under: the first of its inputs that is shown.
PARENTS = ("models", "songs", "split", "dataset")


@command(app, "status", example="rayrec status")
def status(call: Call) -> Shown:
    """Show what the workspace holds as a tree: what was made from what.

    The artifacts that later commands start from are marked as current, the release that answers as live.
    """
    data = look(call.workspace)
    return Shown(data, [lineage_tree(data)])


def lineage_tree(data: dict[str, Any]) -> RenderableType:
    """The data set, below it its splits and artifacts, each below what it was made from."""
    dataset = data["dataset"]
    root = Tree(Text(f"Workspace {data['workspace']}", style="bold"))
    if dataset is None:
        root.add("No data set; see rayrec import --help")
    branches: dict[tuple[str, str], Tree] = {}
    if dataset is not None:
        counts = ", ".join(f"{number(dataset[name])} {name}" for name in ("plays", "users", "songs"))
        rejected = f", {number(dataset['rejected'])} rows rejected" if dataset["rejected"] else ""
        text = f"data set {dataset['id']}  {counts}{rejected}  {size(dataset['bytes'])}  {day(dataset['created_at'])}"
        branches["dataset", dataset["id"]] = root.add(Text(text.rstrip()))
    for split in data["splits"]:
        cut = split.get("protocol") or "in time"
        _grow(root, branches, "split", {**split, "inputs": {"dataset": split["dataset"]}}, [cut], data)
    for kind in KINDS:
        for item in data[kind]:
            facts = [_headline(item["figures"]), size(item["bytes"]), day(item["created_at"])]
            _grow(root, branches, kind, item, facts, data)
    return root


def _grow(
    root: Tree,
    branches: dict[tuple[str, str], Tree],
    kind: str,
    item: dict[str, Any],
    facts: list[str],
    data: dict[str, Any],
) -> None:
    """Hang an artifact below the closest of its inputs that is in the tree."""
    parents = [branches.get((role, item["inputs"].get(role, ""))) for role in PARENTS]
    marks = []
    if item["id"] == data["current"].get("splits" if kind == "split" else kind) and kind != "releases":
        marks.append("current")
    if kind == "releases" and item["id"] == data["active"]:
        marks.append("live")
    parent = next((branch for branch in parents if branch is not None), None)
    if parent is None:
        facts = [f"of data set {item['inputs'].get('dataset', 'unknown')}", *facts]
    words = [f"{noun(kind)} {item['id']}", *filter(None, facts), *(f"[{mark}]" for mark in marks)]
    branches[kind, item["id"]] = (parent or root).add(Text("  ".join(words), style="bold" if marks else ""))


@command(app, "verify", example="rayrec verify")
def verify_workspace(call: Call) -> Shown:
    """Verify the integrity of the workspace.

    Compares every file with its checksum and checks its content: each user once, vectors finite and normalized,
    the index equal to its model, releases complete. Exit code 0 if no problem is found, 1 otherwise.
    """
    from rayrec.jobs.verify import verify_workspace as job

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
    headlines = [f"{name.replace('_', ' ')} {number(values[name])}" for name in HEADLINES if name in values]
    return ", ".join(headlines)


@command(app, "unlock", example="rayrec --workspace s3://bucket/prefix unlock --yes")
def unlock_workspace(call: Call, *, yes: YesOption = False) -> Shown:
    """Show the lock of a workspace on object storage, and delete it with --yes.

    A killed run leaves its lock. Make sure that the run has ended: two runs at once damage what they write.
    On a local disk the lock ends with its process.
    """
    holder = lock_holder(call.workspace)
    if holder is None:
        return Shown({"holder": None, "deleted": False}, ["The workspace is not locked."])
    if yes:
        unlock(call.workspace)
    advice = "Deleted." if yes else "If it has ended, run the command again with --yes."
    return Shown({"holder": asdict(holder), "deleted": yes}, [f"The workspace is locked by {holder}. {advice}"])
