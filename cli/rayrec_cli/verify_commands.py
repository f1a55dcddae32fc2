"""verify, unlock: is everything that the workspace holds whole, and who writes to it?"""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from rayrec.storage.locking import lock_holder, unlock
from rayrec_cli.app import app
from rayrec_cli.options import Call, command
from rayrec_cli.output import Shown, table

YesOption = Annotated[bool, typer.Option("--yes", help="Delete the lock; without it the command only shows it.")]


@command(app, "verify", example="rayrec verify")
def verify(call: Call) -> Shown:
    """Check that the workspace is sound.

    Compares every file with its checksum and looks into each: every user once, vectors finite and
    normalized, the index equal to its model, releases whole. Exit code 0 where all is sound, 1 where not.
    """
    from rayrec.jobs.verify import verify_workspace

    audit = verify_workspace(call.workspace)
    rows = [[item.kind, item.id, item.files, item.problems or "ok"] for item in audit.checked]
    views: list[Any] = [table("Checked", ["kind", "id", "files", "problems"], rows, left=["id"])]
    for title, findings in (("Problems", audit.problems), ("Notes", audit.notes)):
        if findings:
            views.append("\n".join([f"{title}:", *(f"  {each.path} {each.text}" for each in findings)]))
    views.append("The workspace is sound." if audit.is_sound else f"Not sound: {len(audit.problems)} problems.")
    return Shown(audit.to_mapping(), views, exit_code=0 if audit.is_sound else 1)


@command(app, "unlock", example="rayrec --workspace s3://bucket/prefix unlock --yes")
def unlock_workspace(call: Call, *, yes: YesOption = False) -> Shown:
    """Show which run holds the lock of a workspace on object storage, and with --yes delete it.

    A run that was killed leaves its lock behind. Make sure that it has ended: two runs at once damage what they write.
    On a local disk the lock goes with its process.
    """
    holder = lock_holder(call.workspace)
    if holder is None:
        return Shown({"holder": None, "deleted": False}, ["The workspace is not locked."])
    if yes:
        unlock(call.workspace)
    advice = "Deleted." if yes else "If it has ended, run the same command with --yes."
    return Shown({"holder": asdict(holder), "deleted": yes}, [f"The workspace is locked by {holder}. {advice}"])
