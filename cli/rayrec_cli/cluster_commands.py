"""submit, plan: work on a cluster, and what it will take."""

import sys
from typing import Annotated, Any

import typer

from rayrec.errors import InputError
from rayrec_cli.app import ORDER, app
from rayrec_cli.options import Call, command
from rayrec_cli.output import Shown, figures, note

WordsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="COMMAND...", help="A command of rayrec with its options.")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Dashboard of the cluster, http://HOST:8265."),
]
PythonOption = Annotated[
    str | None,
    typer.Option("--python", metavar="PATH", help="The interpreter on the cluster that has rayrec (the image's)."),
]
FilesOption = Annotated[
    str | None, typer.Option("--files", metavar="DIR", help="Folder to upload, in which the command runs.")
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Say the job's id and return while it runs.")]
AttachOption = Annotated[
    str | None, typer.Option("--attach", metavar="ID", help="Follow a job that was submitted before.")
]
StopOption = Annotated[str | None, typer.Option("--stop", metavar="ID", help="End a job.")]

ELSEWHERE = ("submit", "plan")  # commands that have no business on a cluster


@command(
    app,
    "submit",
    options_first=True,
    example="rayrec --workspace s3://music/rayrec submit train --epochs 8 --workers 4 --gpu",
)
def submit(
    call: Call,
    *,
    words: WordsArgument = None,
    address: AddressOption = None,
    python: PythonOption = None,
    files: FilesOption = None,
    detach: DetachOption = False,
    attach: AttachOption = None,
    stop: StopOption = None,
) -> Shown:
    """Run a command on a Ray cluster as a job.

    Its log comes back on stderr, and its exit code is that of this command. Interrupting this command
    leaves the job running; --attach follows it again from the beginning, --stop ends it. Options of
    `submit` stand before the COMMAND.
    """
    words = words or []
    if (bool(words), attach is not None, stop is not None).count(True) != 1:
        raise InputError("give a COMMAND to submit, or --attach ID, or --stop ID; see rayrec submit --help")
    if words and (words[0] not in ORDER or words[0] in ELSEWHERE):
        known = ", ".join(name for name in ORDER if name not in ELSEWHERE)
        raise InputError(f"there is no command {words[0]!r} to submit; there are: {known}")
    from rayrec.jobs.submit import IMAGE_PYTHON, NOT_FOUND, Cluster

    cluster = Cluster(address)
    if stop is not None:
        return _ended(cluster.stop(stop), exit_code=0)
    job = attach
    if job is None:
        workspace = None if any(word.split("=")[0] == "--workspace" for word in words) else call.uri
        job = cluster.submit(words, workspace=workspace, python=python or IMAGE_PYTHON, files=files)
        if detach:
            return _ended(cluster.look(job), exit_code=0, follow=f"rayrec submit --attach {job}")
        note(f"job {job} on {cluster.address}")
    try:
        end = cluster.follow(job, _write)
    except KeyboardInterrupt:
        note(f"the job goes on; follow it again with: rayrec submit --attach {job}")
        raise
    if end.exit_code == NOT_FOUND and python is None:
        note(f"the cluster has no {IMAGE_PYTHON}; name its interpreter with --python")
    return _ended(end, exit_code=end.exit_code or 0)


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _ended(end: Any, *, exit_code: int, follow: str | None = None) -> Shown:
    """Where a job stands, and the exit code of this command."""
    data = {key: value for key, value in end.to_mapping().items() if value is not None}
    shown = {key: data[key] for key in ("status", "seconds", "exit_code") if key in data}
    hint = [] if follow is None else [f"Follow it: {follow}"]
    return Shown(data, [figures(f"Job {end.job}", shown), *hint], exit_code=exit_code)
