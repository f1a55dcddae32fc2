"""status, verify, unlock, clean, release, states, serve, experiment: keep a workspace and its server running."""

from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from rayrec.data.dataset import Dataset
from rayrec.data.lineage import CleanConfig, delete_garbage, find_garbage
from rayrec.data.lineage import status as workspace_status
from rayrec.data.split import describe_unseen_plays
from rayrec.errors import InputError, NotFoundError
from rayrec.evaluation.experiment_report import ExperimentReportConfig, report_experiment
from rayrec.serving.serve_config import ServeConfig, SwitchConfig
from rayrec.storage import releases
from rayrec.storage.artifacts import FITTED, KINDS, Manifest, load_manifest, noun
from rayrec.storage.locking import lock_holder, unlock
from rayrec.storage.releases import PART_KINDS
from rayrec_cli.app import (
    Call,
    CommandOutput,
    ModelOption,
    age,
    app,
    command,
    day,
    experiment_app,
    interval,
    note,
    number,
    release_app,
    size,
    states_app,
    table,
    values_view,
)

UnlockOption = Annotated[bool, typer.Option("--yes", help="Delete the lock; without it only show it.")]

# Main metrics of all kinds of artifacts, in the order of their importance.
HEADLINES = ("validation_recall@20", "recall@20", "coverage", "mean_cosine", "kind", "recall", "users")
# Roles of inputs below which the tree shows an artifact: the first one that is in the tree.
PARENT_ROLES = ("models", "songs", "split", "dataset")
NAMED_ROLES = ("dataset", "split", "from", "retrieval")  # inputs that a line names if the lines above it have others

PARTS = ("dataset", "split", *PART_KINDS)

TastesOption = Annotated[
    str | None, typer.Option("--tastes", metavar="ID", help="Taste vectors. [default: the model's newest]")
]
IndexOption = Annotated[str | None, typer.Option("--index", metavar="ID", help="Index. [default: the model's newest]")]
ActivateOption = Annotated[bool, typer.Option("--activate/--no-activate", help="Make it the live release.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Delete; without it only show what would be deleted.")]
ReleaseArgument = Annotated[str, typer.Argument(metavar="ID", help="Release ID.")]

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URI", help="sqlite:///PATH or redis://HOST:PORT/0. [default: a file in the workspace]"
    ),
]
ReloadOption = Annotated[bool, typer.Option("--force", help="Load completed buckets again.")]
ReleaseOption = Annotated[str | None, typer.Option("--release", metavar="ID", help="Release. [default: the live one]")]


@command(app, "status", example="rayrec status")
def status(call: Call) -> CommandOutput:
    """Show the data set and artifacts of the workspace as a tree.

    Each artifact is below an input that it was made from. The artifacts that later commands start from are marked as
    current; the release that the server uses is marked as live.
    """
    data = workspace_status(call.existing_workspace)
    return CommandOutput(data, [lineage_tree(data)])


def lineage_tree(data: dict[str, Any]) -> RenderableType:
    """Return a tree of the data set, its splits and artifacts, each below an input that it was made from."""
    return _LineageTree(data).root


@dataclass(frozen=True)
class _Branch:
    """A line of the tree, with the inputs and ids of this line and of the lines above it."""

    tree: Tree
    made_from: dict[str, str]  # role -> id


class _LineageTree:
    """Builds the tree; a line names those of its inputs that the lines above it do not name."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data, self.dataset = data, data["dataset"]
        self.root = Tree(Text(f"Workspace {data['workspace']}", style="bold"))
        self.branches: dict[tuple[str, str], _Branch] = {}
        if self.dataset is None:
            self.root.add("No data set; see rayrec import --help")
        else:
            self._add_dataset(self.dataset)
        for split in data["splits"]:
            protocol = split.get("protocol") or "in time"
            self._add("split", {**split, "inputs": {"dataset": split["dataset"]}}, [protocol])
        for kind in KINDS:
            for artifact in data[kind]:
                self._add(kind, artifact, [_headline(artifact["figures"])])
        if data["active"] is not None and ("releases", data["active"]) not in self.branches:
            self.root.add(
                f"The live release {data['active']} is missing or was made by another version of rayrec; "
                "run `rayrec fit`"
            )
        if data["other_versions"]:
            self.root.add(
                f"{number(data['other_versions'])} artifacts of another version of rayrec, which cannot be used; "
                "`rayrec fit` makes new ones, `rayrec clean` deletes these"
            )

    def _add_dataset(self, dataset: dict[str, Any]) -> None:
        counts = ", ".join(f"{number(dataset[name])} {name}" for name in ("plays", "users", "songs"))
        rejected = f", {number(dataset['rejected'])} rows rejected" if dataset["rejected"] else ""
        facts = [f"{counts}{rejected}", size(dataset["bytes"]), age(dataset["created_at"])]
        line = "  ".join(filter(None, [f"data set {dataset['id']}", *facts]))
        branch = _Branch(self.root.add(Text(line)), {"dataset": dataset["id"]})
        for dataset_id in (*dataset["ancestors"], dataset["plays_id"], dataset["id"]):
            self.branches["dataset", dataset_id] = branch

    def _add(self, kind: str, artifact: dict[str, Any], facts: list[str]) -> None:
        """Add an artifact below the first of its inputs in PARENT_ROLES that is in the tree."""
        inputs = dict(artifact["inputs"])
        if self.dataset is not None and inputs.get("dataset") == self.dataset["plays_id"]:
            inputs["dataset"] = self.dataset["id"]
        parents = (self.branches.get((role, inputs.get(role, ""))) for role in PARENT_ROLES)
        parent = next(filter(None, parents), _Branch(self.root, {}))
        made_from = {**parent.made_from, "split" if kind == "split" else kind: artifact["id"]}
        input_texts = [
            self._input_text(role, inputs[role])
            for role in NAMED_ROLES
            if inputs.get(role, made_from.get(role)) != made_from.get(role)
        ]
        if kind in FITTED and "split" in made_from and "split" not in inputs:
            input_texts.append("no split")
            del made_from["split"]
        marks = []
        if artifact["id"] == self.data["current"].get("splits" if kind == "split" else kind) and kind != "releases":
            marks.append("current")
        if kind == "releases" and artifact["id"] == self.data["active"]:
            marks.append("live")
        facts = [*input_texts, *facts, size(artifact["bytes"]), age(artifact["created_at"])]
        line = "  ".join([f"{noun(kind)} {artifact['id']}", *filter(None, facts), *(f"[{mark}]" for mark in marks)])
        tree = parent.tree.add(Text(line, style="bold" if marks else ""))
        self.branches[kind, artifact["id"]] = _Branch(tree, made_from | inputs)

    def _input_text(self, role: str, input_id: str) -> str:
        """Return the text for an input that the lines above do not name."""
        if role == "from":
            return f"from model {input_id}"
        is_earlier = role == "dataset" and self.dataset is not None and input_id in self.dataset["ancestors"]
        return f"{'of earlier ' if is_earlier else 'of ' if role == 'dataset' else ''}{noun(role)} {input_id}"


@command(app, "verify", example="rayrec verify")
def verify_workspace(call: Call) -> CommandOutput:
    """Verify the integrity of the workspace.

    Compares every file with its checksum and checks its content: each user once, vectors finite and normalized,
    the index equal to its model, releases complete. Exit code 0 if no problem is found, 1 otherwise.
    """
    from rayrec.jobs.verify import verify_workspace as job

    audit = job(call.existing_workspace)
    rows = [[artifact.kind, artifact.id, artifact.files, artifact.problems or "ok"] for artifact in audit.checked]
    views: list[Any] = [table("Checked", ["kind", "id", "files", "problems"], rows, left=["id"])]
    for title, findings in (("Problems", audit.problems), ("Notes", audit.notes)):
        if findings:
            views.append("\n".join([f"{title}:", *(f"  {finding.path} {finding.text}" for finding in findings)]))
    views.append("No problems found." if audit.is_sound else f"{len(audit.problems)} problems found.")
    return CommandOutput(audit.to_mapping(), views, exit_code=0 if audit.is_sound else 1)


def _headline(values: dict[str, Any]) -> str:
    """Return the main metrics of an artifact as text."""
    headlines = [f"{name.replace('_', ' ')} {number(values[name])}" for name in HEADLINES if name in values]
    return ", ".join(headlines)


@command(app, "unlock", example="rayrec --workspace s3://bucket/prefix unlock --yes")
def unlock_workspace(call: Call, *, yes: UnlockOption = False) -> CommandOutput:
    """Show the lock of a workspace, and delete it with --yes.

    A killed run leaves its lock on object storage. Make sure that the run has ended: two runs at once damage what they
    write. On a local disk the lock ends with its process.
    """
    holder = lock_holder(call.existing_workspace)
    if holder is None:
        return CommandOutput({"holder": None, "deleted": False}, ["The workspace is not locked."])
    if yes:
        unlock(call.workspace)
        text = f"Deleted the lock of {holder}."
    else:
        text = f"The workspace is locked by {holder}. If that run has ended, run the command again with --yes."
    return CommandOutput({"holder": asdict(holder), "deleted": yes}, [text])


@command(app, "clean", config=CleanConfig, example="rayrec clean --keep 3 --yes")
def clean_workspace(call: Call, config: CleanConfig, *, yes: YesOption = False) -> CommandOutput:
    """Show files that no release needs, and with --yes delete them.

    These are old releases with their taste vectors, models, indexes and song embeddings, parts of the data set that
    `rayrec compact` joined, and files that killed jobs left. It is refused while a job writes to the workspace.
    """
    garbage = find_garbage(call.existing_workspace, config)
    if yes and garbage:
        garbage = delete_garbage(call.workspace, garbage, config)
    total = sum(item.bytes for item in garbage)
    data = {
        "deleted": yes and bool(garbage),
        "bytes": total,
        "items": [{"path": item.path, "bytes": item.bytes, "reason": item.reason} for item in garbage],
    }
    if not garbage:
        return CommandOutput(data, ["Nothing to delete."])
    rows = [[item.path, size(item.bytes), item.reason] for item in garbage]
    summary = f"Deleted {size(total)}." if yes else f"{size(total)} can be deleted: run the same command with --yes."
    return CommandOutput(data, [table("", ["path", "size", "reason"], rows, left=["path", "reason"]), summary])


@command(release_app, "create", example="rayrec release create")
def create(
    call: Call,
    *,
    model: ModelOption = None,
    tastes: TastesOption = None,
    index: IndexOption = None,
    activate: ActivateOption = True,
) -> CommandOutput:
    """Bundle artifacts into a release and make it live.

    A release names one data set, song embeddings, model, added songs, retrieval, rankers, taste vectors and index, with
    checksums; parts that do not exist are left out.
    """
    new_release = releases.create_release(
        call.workspace, model_id=model, tastes_id=tastes, index_id=index, activate=activate
    )
    output = _release_output(call, new_release)
    warnings = []
    parts_without: dict[str, list[str]] = {}  # range of plays -> artifacts that were not trained on it
    for kind in ("songs", "models", "retrieval"):
        if kind in new_release.inputs:
            part = load_manifest(call.workspace, kind, new_release.inputs[kind])
            parts_without.setdefault(describe_unseen_plays(call.workspace, part), []).append(f"{noun(kind)} {part.id}")
    for missing_plays, parts in parts_without.items():
        if missing_plays:
            part_names = ", ".join(parts)
            warnings.append(
                f"not trained on {missing_plays}: {part_names}; `rayrec fit` trains the final models on all plays"
            )
    tastes_dataset_id = load_manifest(call.workspace, "tastes", new_release.inputs["tastes"]).inputs["dataset"]
    if tastes_dataset_id != Dataset(call.workspace).manifest.plays_id:
        warnings.append("the taste vectors lack new plays; run `rayrec taste` and `rayrec release create`")
    data = {**output.data, **({"warnings": warnings} if warnings else {})}
    return CommandOutput(data, [*output.views, *(f"Warning: {warning}." for warning in warnings)])


@command(release_app, "list", example="rayrec release list")
def list_releases(call: Call) -> CommandOutput:
    """List all releases, oldest first."""
    live_id = releases.read_active(call.existing_workspace)["active"]
    all_releases = releases.list_releases(call.workspace)
    rows = [
        ["→" if release.id == live_id else "", release.id, release.inputs["models"], day(release.created_at)]
        for release in all_releases
    ]
    data = [
        {"id": release.id, "active": release.id == live_id, "created_at": release.created_at, **release.inputs}
        for release in all_releases
    ]
    view = table("Releases", ["", "id", "model", "created (UTC)"], rows, left=["id", "model", "created (UTC)"])
    return CommandOutput({"releases": data, "active": live_id}, [view if all_releases else "No releases."])


@command(release_app, "activate", config=SwitchConfig, example="rayrec release activate 3f2a9c51d07b --wait")
def activate(call: Call, config: SwitchConfig, *, release: ReleaseArgument) -> CommandOutput:
    """Make a release live.

    A running server switches without downtime: each replica loads the release in addition to the old one.
    """
    return _switch_release(call, lambda: releases.activate_release(call.workspace, release), config)


@command(release_app, "rollback", config=SwitchConfig, example="rayrec release rollback --wait")
def rollback(call: Call, config: SwitchConfig) -> CommandOutput:
    """Make the previously live release live again."""
    return _switch_release(call, lambda: releases.rollback(call.workspace), config)


def _switch_release(call: Call, change: Callable[[], Manifest], config: SwitchConfig) -> CommandOutput:
    if not (config.wait or config.url):
        return _release_output(call, change())
    from rayrec.serving.live_release import SwitchWait, switch

    return _release_output(
        call, switch(call.workspace, change, SwitchWait(url=config.url, seconds=config.timeout, tell=note))
    )


@command(release_app, "verify", example="rayrec release verify 3f2a9c51d07b")
def verify_release(call: Call, *, release: ReleaseArgument) -> CommandOutput:
    """Verify the checksums of a release."""
    manifest = load_manifest(call.workspace, "releases", release)
    releases.verify_release(call.workspace, manifest)
    return CommandOutput({"id": manifest.id, "verified": True}, [f"Release {manifest.id}: all checksums match."])


@command(states_app, "load", example="rayrec states load --store redis://127.0.0.1:6379/0")
def load_user_states(
    call: Call, *, store: StoreOption = None, release: ReleaseOption = None, force: ReloadOption = False
) -> CommandOutput:
    """Load all users' states from a release into a store.

    The release need not be live. Newer plays in the store are kept. When run again, completed buckets are skipped.
    """
    from rayrec.online.load_states import load_states
    from rayrec.online.state_store import open_store, store_uri

    selected_release = (
        releases.active_release(call.workspace)
        if release is None
        else load_manifest(call.workspace, "releases", release)
    )
    if selected_release is None:
        raise InputError("No release is live; pass --release ID or run `rayrec release activate ID`")
    dataset = Dataset(call.workspace)
    with closing(open_store(store_uri(call.workspace, store), dataset.lineage)) as opened_store:
        load_counts = load_states(dataset, opened_store, selected_release, repeat=force)
    rate = round(load_counts.users / load_counts.seconds) if load_counts.seconds else None
    counts = {
        "release": selected_release.id,
        **asdict(load_counts),
        "users": load_counts.users,
        "users_per_second": rate,
    }
    return CommandOutput(counts, [values_view("User states", counts)])


@command(app, "serve", config=ServeConfig, example="rayrec serve --port 8000")
def serve(call: Call, config: ServeConfig) -> CommandOutput:
    """Serve recommendations over HTTP.

    Runs on this machine until Ctrl-C and follows the live release; `rayrec release activate` switches it while
    it runs. Loads the users' states of the live release first if the store lacks them. For a cluster see
    cluster/serve.yaml.
    """
    from rayrec.recommend.index import require_one_faiss
    from rayrec.serving.run import require_startable, running, stop_requests, wait_for_stop

    data: dict[str, Any] = {"url": None, "workspace": call.workspace.uri, "release": None}
    with stop_requests() as check_stop:
        try:
            require_one_faiss()
            require_startable(config)  # before the states are loaded, which may take long
            for release in config.experiment.releases if config.experiment else ():
                load_manifest(call.workspace, releases.KIND, release)  # fails before the start if it does not exist
            live = _load_missing_states(call, config.store, check_stop)
            data["release"] = live.id
            note(f"Live release {live.id}: model {live.inputs['models']}, data set {live.inputs['dataset']}")
            with running(call.workspace, config, check_stop) as url:
                data["url"] = url
                note(f"Serving at {url} (Ctrl-C stops it)")  # short: programs look for the URL in one line
                with suppress(KeyboardInterrupt):  # requests in progress are finished when the block ends
                    wait_for_stop(config.host, check_stop)
                note("Stopping")
        except KeyboardInterrupt:  # during the start
            note("Stopping")
    return CommandOutput(data, ["Stopped."])


def _load_missing_states(call: Call, store: str | None, check_stop: Callable[[], None]) -> Manifest:
    """Load the user states of the live release if the store lacks them, and return the release.

    `check_stop` is called after each bucket of users, and may raise an exception to stop the load. Raises
    `NotFoundError` if no release is live.
    """
    from rayrec.online.load_states import load_states
    from rayrec.online.state_store import open_store, store_uri

    release = releases.active_release(call.workspace)
    if release is None:
        raise NotFoundError(
            f"workspace {call.workspace.uri} has no live release; run `rayrec fit` or `rayrec release create` first"
        )
    dataset = Dataset(call.workspace)
    with closing(open_store(store_uri(call.workspace, store), dataset.lineage)) as opened_store:
        if len(opened_store.loaded(release.inputs["tastes"])) < dataset.manifest.buckets:
            note(f"Loading the users' states of release {release.id} into the store")
            load_counts = load_states(dataset, opened_store, release, after_bucket=check_stop)
            note(f"{load_counts.users:,} users loaded")
    return release


def _release_output(call: Call, release: Manifest) -> CommandOutput:
    is_live = releases.is_active(call.workspace, release.id)
    parts = {name: release.inputs[name] for name in PARTS if name in release.inputs}
    title = f"Release {release.id}" + (" (live)" if is_live else "")
    return CommandOutput({"id": release.id, "active": is_live, **parts}, [values_view(title, parts)])


@command(experiment_app, "report", config=ExperimentReportConfig, example="rayrec experiment report --days 7")
def report(call: Call, config: ExperimentReportConfig) -> CommandOutput:
    """Compare the arms of an experiment by the plays after answers.

    Of the songs played after an answer, recall is the share that the answer recommended, with 95 % intervals by
    bootstrap over users. Reads the impression log that `rayrec serve --log-impressions` writes.
    """
    comparison = report_experiment(call.workspace, config)
    rows = [
        [arm.arm, arm.users, arm.answers, arm.played, arm.recall, interval(arm.low, arm.high), arm.skips, arm.likes]
        for arm in comparison.arms
    ]
    title = f"Experiment {comparison.experiment}, {day(comparison.first_answer)} to {day(comparison.last_answer)}"
    headers = ["arm", "users", "answers", "played", "recall", "95 %", "skips", "likes"]
    return CommandOutput(comparison.to_mapping(), [table(title, headers, rows), comparison.verdict])
