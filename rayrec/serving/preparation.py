"""What the replicas of a node share of a release, made before they load it by a process of low priority."""

import os
import subprocess
import sys
from pathlib import Path

from rayrec.errors import RayrecError
from rayrec.serving.live_release import load_parts
from rayrec.serving.served_catalog import catalog_version, load_served_catalog
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.object_storage import made_once
from rayrec.storage.workspace import SONGS_TABLE, Workspace

SMALL_RELEASE = 16_000_000  # bytes that a replica reads itself sooner than a process has started
# The priority comes before all imports, which take most of the time of a release of medium size.
COMMAND = "import os, sys; os.nice(19); from rayrec.serving.preparation import make_shared; make_shared(*sys.argv[1:])"


def prepare(workspace: Workspace, release_id: str) -> None:
    """Compare the files of a release with their checksums and make the table of its catalog, once for this node.

    Replicas answer meanwhile, so a process of low priority does it, whose memory is free again when it ends. Whoever
    comes second waits for it. Nothing is done for a small release, which takes a replica less time than the process.

    Raises `NotFoundError` for an unknown release, `RayrecError` with what the process said where it fails.
    """
    release = artifacts.load_manifest(workspace, releases.KIND, release_id)
    if answering_bytes(workspace, release) < SMALL_RELEASE:
        return
    version = f"prepared {catalog_version(workspace, release)} {release.id}"

    def in_process(target: Path) -> None:
        command = [sys.executable, "-c", COMMAND, workspace.uri, release.id]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
        ended = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if ended.returncode:
            *_, last = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
            raise RayrecError(f"release {release.id} cannot be prepared: {last}")
        target.touch()

    made_once(version, "prepared", in_process)


def make_shared(uri: str, release_id: str) -> None:
    """The work of the process; fails with a line that says why."""
    workspace = Workspace(uri)
    try:
        release, recommender = load_parts(workspace, release_id)
        load_served_catalog(workspace, release, recommender)
    except RayrecError as error:
        sys.exit(str(error))


def answering_bytes(workspace: Workspace, release: Manifest) -> int:
    """Bytes of the files that a replica loads of a release: the songs and the parts that answer."""
    paths = [SONGS_TABLE]
    for kind in releases.ANSWERING_KINDS:
        if kind in release.inputs:
            part = artifacts.load_manifest(workspace, kind, release.inputs[kind])
            paths += [part.path(name) for name in part.files]
    infos = workspace.filesystem.get_file_info([workspace.full(path) for path in paths])
    return sum(info.size or 0 for info in infos)
