"""The entry point: runs a command and turns errors into one line and an exit code."""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer

from rayrec.errors import RayrecError
from rayrec_cli import (
    cluster_commands,
    data_commands,
    model_commands,
    recommend_commands,
    release_commands,
    run_commands,
    workspace_commands,
)
from rayrec_cli.app import app

__all__ = [
    "cluster_commands",
    "data_commands",
    "main",
    "model_commands",
    "recommend_commands",
    "release_commands",
    "run_commands",
    "workspace_commands",
]

UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's, which newer typers carry under a private name
FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 wrong use or bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("RAYREC_DEBUG") == "1"
    if not (debug or sys.warnoptions):
        warnings.simplefilter("ignore")
    try:
        return int(app(arguments, prog_name="rayrec", standalone_mode=False) or 0)
    except UsageError as error:
        return _usage(error, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted", INTERRUPTED, debug=False)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: no reader is left
        return FAILED
    except Exception as error:
        # Ray wraps what a worker raised: as its cause, below a text that holds the whole traceback.
        cause = getattr(error, "cause", error)
        if isinstance(cause, RayrecError):
            return _fail(str(cause), cause.exit_code, debug)
        # A bug, or a failed machine.
        last = str(cause).strip().splitlines()[-1:] or [""]
        return _fail(f"{type(cause).__name__}: {last[0]}; run again with --debug for the traceback", FAILED, debug)


def _usage(error: Exception, debug: bool) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message()  # type: ignore[attr-defined]
    if not message.strip() or message.startswith("Usage:"):  # no command: the message is the help
        print(message, file=sys.stderr)
        return WRONG_USE
    where = context.command_path if context is not None else "rayrec"
    return _fail(f"{message.rstrip('.')}; see {where} --help", WRONG_USE, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first = message.partition(" ")[0]
    if first.isalpha() and first.islower() and first != "rayrec":
        message = first.capitalize() + message[len(first) :]
    print("rayrec:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
