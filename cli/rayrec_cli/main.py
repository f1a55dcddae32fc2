"""The entry point: runs a command and turns errors into one line and an exit code."""

import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from rayrec.errors import RayrecError
from rayrec_cli import cluster_commands, data_commands, operations_commands, recommend_commands, stage_commands
from rayrec_cli.app import CommandOutput, OutputError, app, error_data, print_error, show

__all__ = [
    "cluster_commands",
    "data_commands",
    "main",
    "operations_commands",
    "recommend_commands",
    "stage_commands",
]

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 wrong use or bad input."""
    try:
        return _run(arguments)
    except OutputError as error:
        if not isinstance(error.__cause__, BrokenPipeError):  # else its reader has ended, as `head` does
            print_error(str(error))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes the rest of the output when it ends
        return FAILED


def _run(arguments: Sequence[str] | None) -> int:
    """Run one command line and return its exit code. Raises `OutputError` if stdout cannot be written."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("RAYREC_DEBUG") == "1"
    if not (debug or sys.warnoptions):
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a song title that the terminal cannot show must not stop a command
            stream.reconfigure(errors="backslashreplace")
    fail = _Failure(as_json="--json" in arguments, debug=debug)
    try:
        return int(app(arguments, prog_name="rayrec", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort) as error:
        return fail(error, "Interrupted", INTERRUPTED, kind="interrupted")
    except OutputError:
        raise
    except Exception as error:
        if hasattr(error, "format_message"):  # an error of click, which newer versions of typer contain
            return _report_usage_error(error, fail)
        # Ray wraps an error of a worker: the error is the `cause`, and the text is the whole traceback.
        cause = getattr(error, "cause", error)
        if isinstance(cause, RayrecError):
            return fail(cause, str(cause), cause.exit_code)
        # A bug, or a failed machine.
        last_lines = str(cause).strip().splitlines()[-1:] or [""]
        message = f"{type(cause).__name__}: {last_lines[0]}; run again with --debug for the traceback"
        return fail(cause, message, FAILED, kind="internal")


@dataclass(frozen=True)
class _Failure:
    """Reports an error: one line on stderr, and with --json one object on stdout."""

    as_json: bool
    debug: bool

    def __call__(self, error: BaseException, message: str, exit_code: int, kind: str | None = None) -> int:
        if self.debug and kind != "interrupted":
            traceback.print_exc()
        if self.as_json:
            show(CommandOutput(error_data(error, message, kind)), as_json=True)
        print_error(message)
        return exit_code


def _report_usage_error(error: Any, fail: _Failure) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message()
    command_path = context.command_path if context is not None else "rayrec"
    if not message.strip() or message.startswith("Usage:"):  # no command: the message is the help
        if fail.as_json:
            return fail(error, f"Missing command; see {command_path} --help", WRONG_USE, kind="usage")
        print(message, file=sys.stderr)
        return WRONG_USE
    return fail(error, f"{message.rstrip('.')}; see {command_path} --help", WRONG_USE, kind="usage")


if __name__ == "__main__":
    sys.exit(main())
