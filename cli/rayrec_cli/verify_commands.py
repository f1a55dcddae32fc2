"""verify: is everything that the workspace holds whole?"""

from typing import Any

from rayrec_cli.app import app
from rayrec_cli.options import Call, command
from rayrec_cli.output import Shown, table


@command(app, "verify", example="rayrec verify")
def verify(call: Call) -> Shown:
    """Check that the workspace is sound.

    Compares every file with its checksum and looks into each: every user once, vectors finite and
    normalized, the index equal to its model, releases whole. Exit code 0 where all is sound, 1 where not.
    """
    from rayrec.jobs.verifying.verify import verify_workspace

    audit = verify_workspace(call.workspace)
    rows = [[item.kind, item.id, item.files, item.problems or "ok"] for item in audit.checked]
    views: list[Any] = [table("Checked", ["kind", "id", "files", "problems"], rows, left=["id"])]
    for title, findings in (("Problems", audit.problems), ("Notes", audit.notes)):
        if findings:
            views.append("\n".join([f"{title}:", *(f"  {each.path} {each.text}" for each in findings)]))
    views.append("The workspace is sound." if audit.is_sound else f"Not sound: {len(audit.problems)} problems.")
    return Shown(audit.to_mapping(), views, exit_code=0 if audit.is_sound else 1)
