"""tune: try settings and say which serve best."""

from typing import Annotated, Any

import typer

from rayrec.data.split import choose_split
from rayrec.jobs.trials import TuneConfig, to_toml
from rayrec_cli.app import app
from rayrec_cli.model_commands import SplitOption
from rayrec_cli.options import Call, ForceOption, command
from rayrec_cli.output import Shown, note, table

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="TOML file with [embed] and [train]; a list is a choice.")
]


@command(app, "tune", config=TuneConfig, example="rayrec tune space.toml --trials 20 --seed 1")
def tune(
    call: Call, config: TuneConfig, *, file: FileArgument, split: SplitOption = None, force: ForceOption = False
) -> Shown:
    """Try settings of song vectors and network.

    Each combination is fitted before the validation range and judged on it. A sweep that was interrupted
    goes on where it was. The best settings are printed as sections for `rayrec run`.
    """
    from rayrec.jobs.tune import JUDGED_BY
    from rayrec.jobs.tune import tune as job

    def say(row: dict[str, Any], trials: int) -> None:
        note(f"trial {row['trial']} of {trials}: {JUDGED_BY} {row[JUDGED_BY]:.4f} ({row['seconds']:,.1f} s)")

    chosen = choose_split(call.workspace, split)
    made = job(call.workspace, config, file, split=chosen, repeat=force, on_trial=say)
    ranked = sorted(made.metrics["trials"], key=lambda row: -row[JUDGED_BY])
    columns = [name for name in ranked[0] if name not in ("settings", "songs", "songs_made")]
    rows = [[(_setting if "." in name else _cell)(row[name]) for name in columns] for row in ranked]
    kept = f"Table: {call.workspace.full(made.path('trials.csv'))}"
    heads = [name.removeprefix("validation_") for name in columns]
    views = [table("Trials, best first", heads, rows), kept, f"Best settings:\n\n{to_toml(made.metrics['best'])}"]
    return Shown({"id": made.id, **made.metrics}, [*views])


def _cell(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _setting(value: Any) -> Any:
    """A setting as it was given: 1e-5 must not become 0.000."""
    return f"{value:g}" if isinstance(value, float) else _cell(value)
