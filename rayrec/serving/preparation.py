"""Prepares what the replicas of a node share of a release, in a process of low priority, before they load it."""

import os
import subprocess
import sys
from pathlib import Path

from rayrec.errors import RayrecError
from rayrec.serving.live_release import load_parts
from rayrec.serving.served_catalog import catalog_version, load_served_catalog
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.object_storage import cached_file
from rayrec.storage.workspace import SONGS_TABLE, Workspace

SMALL_RELEASE = 16_000_000  # bytes; a replica reads a smaller release faster than a process starts
# Lower the priority before the imports, which take most of the time for a release of medium size.
COMMAND = "import os, sys; os.nice(19); from rayrec.serving.preparation import make_shared; make_shared(*sys.argv[1:])"


def prepare(workspace: Workspace, release_id: str) -> None:
    """Compare the files of a release with their checksums and make the shared table of its catalog, once per node.

    A process of low priority does this work, since replicas answer requests meanwhile; its memory is free again when it
    ends. If another replica has started such a process, this call waits for it. A small release is skipped: loading it
    takes a replica less time than starting the process.

    Raises `NotFoundError` for an unknown release, and `RayrecError` with the last line of the process's error output if
    the process fails.
    """
    release = artifacts.load_manifest(workspace, releases.KIND, release_id)
    if answering_bytes(workspace, release) < SMALL_RELEASE:
        return
    version = f"prepared {catalog_version(workspace, release)} {release.id}"

    def prepare_in_process(target: Path) -> None:
        command = [sys.executable, "-c", COMMAND, workspace.uri, release.id]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
        process = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if process.returncode:
            *_, last_line = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
            raise RayrecError(f"release {release.id} cannot be prepared: {last_line}")
        target.touch()

    cached_file(version, "prepared", prepare_in_process)


def make_shared(uri: str, release_id: str) -> None:
    """Do the work of the process that `prepare` starts. Exit with an error message of one line if it fails."""
    workspace = Workspace(uri)
    try:
        release, recommender = load_parts(workspace, release_id)
        load_served_catalog(workspace, release, recommender)
    except RayrecError as error:
        sys.exit(str(error))


def answering_bytes(workspace: Workspace, release: Manifest) -> int:
    """Return the bytes of the files that a replica loads for a release: the songs and the parts that answer."""
    paths = [SONGS_TABLE]
    for kind in releases.ANSWERING_KINDS:
        if kind in release.inputs:
            part = artifacts.load_manifest(workspace, kind, release.inputs[kind])
            paths += [part.path(name) for name in part.files]
    infos = workspace.filesystem.get_file_info([workspace.full(path) for path in paths])
    return sum(info.size or 0 for info in infos)
