"""release create, list, activate, rollback."""

from collections.abc import Callable
from typing import Annotated

import typer

from rayrec.storage import releases
from rayrec.storage.artifacts import Manifest, load
from rayrec_cli.app import release_app
from rayrec_cli.options import Call, command
from rayrec_cli.output import Shown, day, figures, note, table

PARTS = ("dataset", "split", "songs", "models", "tastes", "indexes")

ModelOption = Annotated[str | None, typer.Option("--model", metavar="ID", help="Model (the newest with all parts).")]
TastesOption = Annotated[str | None, typer.Option("--tastes", metavar="ID", help="Tastes (the model's newest).")]
IndexOption = Annotated[str | None, typer.Option("--index", metavar="ID", help="Index (the model's newest).")]
ActivateOption = Annotated[bool, typer.Option("--activate/--no-activate", help="Make it the live release.")]
WaitOption = Annotated[
    bool,
    typer.Option("--wait", help="Wait until all replicas answer with it; if one refuses it, restore the old."),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="Address of the application (default: its reports in the workspace)."
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="Give up after this time (as long as replicas load)."),
]
ReleaseArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of the release.")]


@command(release_app, "create", example="rayrec release create")
def create(
    call: Call,
    *,
    model: ModelOption = None,
    tastes: TastesOption = None,
    index: IndexOption = None,
    activate: ActivateOption = True,
) -> Shown:
    """Make a release and make it live.

    It ties data set, song vectors, model, tastes and index under one id, with checksums.
    """
    made = releases.create_release(call.workspace, model_id=model, tastes_id=tastes, index_id=index, activate=activate)
    return _release(call, made)


@command(release_app, "list", example="rayrec release list")
def list_releases(call: Call) -> Shown:
    """List the releases, oldest first."""
    active = releases.active_release(call.workspace)
    live = None if active is None else active.id
    found = releases.list_releases(call.workspace)
    rows = [["→" if item.id == live else "", item.id, item.inputs["models"], day(item.created_at)] for item in found]
    data = [{"id": item.id, "active": item.id == live, "created_at": item.created_at, **item.inputs} for item in found]
    view = table("Releases", ["", "id", "model", "created (UTC)"], rows, left=["id", "model", "created (UTC)"])
    return Shown({"releases": data, "active": live}, [view if found else "There are no releases."])


@command(release_app, "activate", example="rayrec release activate 3f2a9c51d07b --wait")
def activate(
    call: Call,
    *,
    release: ReleaseArgument,
    wait: WaitOption = False,
    url: UrlOption = None,
    timeout: TimeoutOption = None,
) -> Shown:
    """Make a release the live one.

    A running application moves to it without a gap: each replica loads it beside the old one and then
    switches. With --wait the command ends once all of them have.
    """
    return _switched(call, lambda: releases.activate_release(call.workspace, release), wait, url, timeout)


@command(release_app, "rollback", example="rayrec release rollback --wait")
def rollback(call: Call, *, wait: WaitOption = False, url: UrlOption = None, timeout: TimeoutOption = None) -> Shown:
    """Make the release live that was live before."""
    return _switched(call, lambda: releases.rollback(call.workspace), wait, url, timeout)


def _switched(call: Call, change: Callable[[], Manifest], wait: bool, url: str | None, timeout: float | None) -> Shown:
    if not (wait or url):
        return _release(call, change())
    from rayrec.serving.release_switch import SwitchWait, switch

    return _release(call, switch(call.workspace, change, SwitchWait(url=url, seconds=timeout, tell=note)))


@command(release_app, "verify", example="rayrec release verify 3f2a9c51d07b")
def verify(call: Call, *, release: ReleaseArgument) -> Shown:
    """Compare every file of a release with its checksum."""
    found = load(call.workspace, "releases", release)
    releases.verify_release(call.workspace, found)
    return Shown({"id": found.id, "verified": True}, [f"Release {found.id}: every file is as it was made."])


def _release(call: Call, release: Manifest) -> Shown:
    active = releases.active_release(call.workspace)
    is_live = active is not None and active.id == release.id
    parts = {name: release.inputs[name] for name in PARTS if name in release.inputs}
    title = f"Release {release.id}" + (" (live)" if is_live else "")
    return Shown({"id": release.id, "active": is_live, **parts}, [figures(title, parts)])
