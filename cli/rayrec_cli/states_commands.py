"""states load: the states of users, for answers on demand."""

from dataclasses import asdict
from typing import Annotated

import typer

from rayrec.data.dataset import Dataset
from rayrec.errors import InputError
from rayrec.storage.artifacts import load as load_artifact
from rayrec.storage.releases import active_release
from rayrec_cli.app import states_app
from rayrec_cli.options import Call, ForceOption, command
from rayrec_cli.output import Shown, figures

StoreOption = Annotated[
    str | None,
    typer.Option("--store", metavar="URI", help="sqlite:///PATH or redis://HOST:PORT/0 (a file in the workspace)."),
]
ReleaseOption = Annotated[str | None, typer.Option("--release", metavar="ID", help="Release (the live one).")]


@command(states_app, "load", example="rayrec states load --store redis://127.0.0.1:6379/0")
def load(call: Call, *, store: StoreOption = None, release: ReleaseOption = None, force: ForceOption = False) -> Shown:
    """Load the states and plays of all users from a release.

    The release need not be live: its states are stored beside those of the live one. Plays in the store that are
    newer than the release's stay. A second run continues with the buckets that are left.
    """
    from rayrec.online.load_states import load_states
    from rayrec.online.state_store import open_store, store_uri

    chosen = active_release(call.workspace) if release is None else load_artifact(call.workspace, "releases", release)
    if chosen is None:
        raise InputError("no release is live; name one with --release ID, or run `rayrec release activate ID`")
    dataset = Dataset(call.workspace)
    opened = open_store(store_uri(call.workspace, store), dataset.lineage)
    try:
        loaded = load_states(dataset, opened, chosen, repeat=force)
    finally:
        opened.close()
    rate = round(loaded.users / loaded.seconds) if loaded.seconds else None
    result = {"release": chosen.id, **asdict(loaded), "users": loaded.users, "users_per_second": rate}
    return Shown(result, [figures("User states", result)])
