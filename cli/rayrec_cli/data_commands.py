"""generate, import, compact, forget, describe, split: from files of plays to a data set with splits."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from rayrec.data.dataset import Dataset
from rayrec.data.split import WEAKER, Split, SplitConfig, choose_split, holds_for, split_dataset
from rayrec.data.synthetic import GenerateConfig
from rayrec.errors import InputError
from rayrec.importing.descriptions import DescribeConfig, describe, unused_metadata_notes
from rayrec.importing.import_plan import ImportConfig, TooManyRejectedError, rejected_examples
from rayrec.importing.inspection import inspect_files
from rayrec.importing.merging import PARTS_BEFORE_COMPACT
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.delimited import spelled_delimiter
from rayrec.storage.artifacts import DatasetManifest
from rayrec_cli.app import (
    Call,
    CommandOutput,
    app,
    command,
    error_data,
    inputs_view,
    note,
    number,
    size,
    table,
    values_view,
)

FormatArgument = Annotated[str | None, typer.Argument(metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")]
PathsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH", help="Files or folders of files, .gz and .bz2 too; local, s3:// or gs://."),
]
TableArgument = Annotated[
    str | None, typer.Argument(metavar="FILE", help="csv (.gz or .bz2 too) or Parquet file with one row per song.")
]

MOST_COLUMNS = 30  # shown of a file that is inspected
BEFORE_STREAMING = 946_684_800_000  # ms UTC, start of the year 2000

AppendOption = Annotated[bool, typer.Option("--append", help="Add the plays to the data set as a new part.")]
ReplaceDatasetOption = Annotated[bool, typer.Option("--force", help="Replace the existing data set.")]
ReplacePlaysOption = Annotated[bool, typer.Option("--force", help="Replace the existing plays or playlists.")]


@command(app, "generate", config=GenerateConfig, example="rayrec generate --users 2000 --songs 2000 --seed 1")
def generate(call: Call, config: GenerateConfig, *, force: ReplaceDatasetOption = False) -> CommandOutput:
    """Generate a synthetic data set."""
    from rayrec.jobs.generate import generate as job

    return _dataset_output(job(call.workspace, config, repeat=force))


@command(
    app,
    "import",
    config=ImportConfig,
    arguments={"format": FormatArgument, "paths": PathsArgument},
    example="rayrec import csv plays.csv --columns user=user_id,song=song_id,played_at=ts",
)
def import_data(
    call: Call,
    config: ImportConfig,
    *,
    append: AppendOption = False,
    force: ReplacePlaysOption = False,
) -> CommandOutput:
    """Import plays or playlists from files.

    With --append the plays are added to the existing ones; duplicates are merged.
    """
    from rayrec.jobs.import_data import append_plays
    from rayrec.jobs.import_data import import_data as job

    if append and force:
        raise InputError("--append adds plays and --force replaces them; pass only one of them")
    try:
        if not append:
            output = _dataset_output(job(call.workspace, config, repeat=force))
            for message in unused_metadata_notes(Dataset(call.workspace)):
                note(message)
            return output
        split = choose_split(call.workspace)
        return _append_output(append_plays(call.workspace, config), _split_validity(split, Dataset(call.workspace)))
    except TooManyRejectedError as error:
        return too_many_rejected(error)


def too_many_rejected(error: TooManyRejectedError) -> CommandOutput:
    """Return the output of a refused import: its summary and the error."""
    summary = error.summary.to_mapping()
    return CommandOutput({**error_data(error), "import": summary}, _import_views(summary), error=error)


InspectFormat = Annotated[str, typer.Argument(metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")]
InspectPaths = Annotated[list[str], typer.Argument(metavar="PATH", help="Files, or folders of files.")]


ZONE_HELP = f"{ImportConfig.model_fields['timezone'].description}."
InspectZone = Annotated[str, typer.Option("--timezone", metavar="NAME", help=ZONE_HELP)]


@command(app, "inspect", example="rayrec inspect csv plays.csv")
def inspect(
    call: Call, *, format_name: InspectFormat, paths: InspectPaths, timezone_name: InspectZone = "UTC"
) -> CommandOutput:
    """Look at the first rows of files before they are imported.

    Shows the detected column roles, the time format, the rows that would be rejected and why, and the import command.
    """
    inspection = inspect_files(format_name, paths, timezone_name)
    values: dict[str, Any] = {
        "files": inspection.files,
        "bytes": size(inspection.bytes),
        "rows read": inspection.rows,
    }
    if inspection.delimiter:
        values["delimiter"] = spelled_delimiter(inspection.delimiter)
    if inspection.time:
        values["times"] = inspection.time
    views: list[RenderableType] = [values_view(f"{inspection.format}, {inspection.kind}", values)]
    if inspection.columns:
        # Columns with a role come first, because exports may have a hundred other columns.
        shown_columns = sorted(inspection.columns, key=lambda column: not column.role)[:MOST_COLUMNS]
        rows = [[column.name, column.role, column.type, column.example] for column in shown_columns]
        views.append(table("Columns", ["column", "role", "type", "example"], rows, left=["role", "type", "example"]))
        if len(shown_columns) < len(inspection.columns):
            views.append(
                f"{len(inspection.columns) - len(shown_columns):,} more columns are not shown; --json lists "
                "all of them."
            )
    if inspection.rejected:
        views.append(table("Rows that would be rejected", ["reason", "rows"], list(inspection.rejected.items())))
        views.append("\n".join(f"{reason}: {example}" for reason, example in inspection.examples.items()))
    notes = [*inspection.doubts.values(), *inspection.left_out.values(), *inspection.notes]
    return CommandOutput(inspection.to_mapping(), [*views, *notes, inspection.command])


DeletedUserOption = Annotated[
    list[str] | None, typer.Option("--user", metavar="ID", help="User ID; repeat the option for several users.")
]
UsersOption = Annotated[Path | None, typer.Option("--users", metavar="FILE", help="File of user IDs, one per line.")]
ExistingStoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URI",
        help="sqlite:///PATH or redis://HOST:PORT/0. [default: the file in the workspace, if it exists]",
    ),
]
CompactOption = Annotated[bool, typer.Option("--compact", help="Run rayrec compact afterwards.")]


@command(app, "compact", example="rayrec compact")
def compact_parts(call: Call, *, store: ExistingStoreOption = None) -> CommandOutput:
    """Join the parts of the data set and erase deleted users.

    Parts are added by import --append. Other plays and all artifacts stay valid. Reads need fewer requests afterwards.
    The old files stay until rayrec clean deletes them; rows of users whom rayrec forget or the server deleted are
    erased from them, too. The store of user states also rewrites its files: SQLite its write-ahead log, Redis its
    append-only file and snapshot.
    """
    from rayrec.jobs.compact import compact as job
    from rayrec.online.state_store import open_user_store

    compaction = job(call.workspace)
    opened_store = open_user_store(call.workspace, store, compaction.dataset.lineage or compaction.dataset.id)
    if opened_store is not None:
        with closing(opened_store):
            opened_store.rewrite()
    files_before, files_after = len(compaction.spans_before), len(compaction.spans)
    data = {"id": compaction.dataset.id, "files_per_bucket": files_after, "files_per_bucket_before": files_before}
    has_joined = compaction.spans != compaction.spans_before
    views: list[RenderableType] = [
        f"Joined {files_before} files per bucket into {files_after}." if has_joined else "No parts to join."
    ]
    if compaction.erased.users:
        views.append(f"{compaction.erased.users:,} deleted users were erased from {compaction.erased.files:,} files.")
    return CommandOutput({**data, "parts": compaction.dataset.parts, "erased": asdict(compaction.erased)}, views)


@command(app, "forget", example="rayrec forget --user ann --store redis://127.0.0.1:6379/0")
def forget(
    call: Call,
    *,
    user: DeletedUserOption = None,
    users: UsersOption = None,
    store: ExistingStoreOption = None,
    compact: CompactOption = False,
) -> CommandOutput:
    """Delete users; unknown IDs are accepted.

    From now on they get recommendations like unknown users. Their plays from before this moment are rejected; later
    plays count as those of new users. The next rayrec compact, or any job that reads users, erases their rows from all
    files.
    """
    from rayrec.jobs.forget import forget_users

    ids = [*(user or []), *(_read_lines(users) if users else [])]
    if not ids:
        raise InputError("No user was given; pass --user ID or --users FILE")
    count = forget_users(call.workspace, ids, store=store)
    deletion_text = f"{count:,} users deleted."
    if not compact:
        return CommandOutput({"users": count}, [deletion_text, "`rayrec compact` erases their rows from all files."])
    compaction = compact_parts(call, store=store)
    return CommandOutput({"users": count, "compact": compaction.data}, [deletion_text, *compaction.views])


def _read_lines(path: Path) -> list[str]:
    try:
        # utf-8-sig, because spreadsheets put a byte order mark in front of the first user
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; pass a UTF-8 file with one user ID per line") from error


@command(
    app, "describe", config=DescribeConfig, example="rayrec describe songs.csv --columns song=id,released=release_date"
)
def describe_songs(call: Call, config: DescribeConfig, *, path: TableArgument = None) -> CommandOutput:
    """Import song metadata, such as artists and release dates.

    Reads titles, artists, albums, release dates, markets and content vectors. Replaces existing metadata; with
    --append, songs that are not in the file keep theirs. The server can filter recommendations by the metadata, and
    `rayrec songs add` estimates embeddings of new songs from artist, album and content.
    """
    counts = asdict(describe(call.workspace, config, path))
    views = [values_view("Song metadata", counts), inputs_view(counts["inputs"])]
    for name, title in (("rejected", "Rejected rows"), ("invalid", "Invalid values, left empty")):
        if counts[name]:
            views.append(table(title, ["reason", name], list(counts[name].items())))
    return CommandOutput(counts, [*views, *(f"Warning: {warning}" for warning in counts["warnings"])])


@command(app, "split", config=SplitConfig, example="rayrec split --test-days 30")
def split(call: Call, config: SplitConfig) -> CommandOutput:
    """Split the data set into training, validation and test range.

    Splits by time, or with --last-fraction within each user's plays. Shares of users and of songs can be held out
    entirely. Use --held-out-songs to measure recall on songs without training data.
    """
    new_split = split_dataset(call.workspace, config)
    cuts = {name.replace("_", " "): _format_cut(value) for name, value in new_split.figures().items()}
    values = {"split": new_split.id, **cuts, "users held out": f"{new_split.held_out_share:.1%}"}
    if new_split.held_out_songs:
        values["songs held out"] = f"{new_split.held_out_songs:.1%}"
    protocol_notes = [f"This protocol is {WEAKER}."] if new_split.protocol == "last-fraction" else []
    inputs = {"dataset": new_split.dataset}
    return CommandOutput(
        {**asdict(new_split), "inputs": inputs}, [values_view("", values), inputs_view(inputs), *protocol_notes]
    )


def _dataset_output(manifest: DatasetManifest) -> CommandOutput:
    rejected = sum(manifest.rejected.values())
    values: dict[str, Any] = {
        "id": manifest.id,
        "plays": manifest.plays,
        "users": manifest.users,
        "songs": manifest.songs,
        "playlists": manifest.playlists,
        "read": manifest.read,
        **({"likes": manifest.likes} if manifest.has_likes else {}),
        "merged": manifest.merged,
        "rejected": rejected,
    }
    shown_values = (
        values
        if not manifest.plays
        else {
            **values,
            "first play": _format_moment(manifest.first_play),
            "last play": _format_moment(manifest.last_play),
        }
    )
    if manifest.times == "positions":
        shown_values = {**values, "times": "none, only the order of plays is known"}
    times = {"first_play": manifest.first_play, "last_play": manifest.last_play}
    data = {**values, **times, "times": manifest.times, "reasons": manifest.rejected, "import": manifest.last_import}
    views = [values_view("Data set", shown_values), *_import_views(manifest.last_import)]
    left_out_rows = {reason: rows for reason, rows in manifest.rejected.items() if "fewer than" in reason}
    if left_out_rows:
        views.append(table("Rows left out", ["reason", "rows"], list(left_out_rows.items())))
    if rejected:
        views.append("Rejected rows are stored with line and reason in dataset/rejected.")
    if manifest.times == "real" and manifest.plays > 0 and manifest.first_play < BEFORE_STREAMING:
        views.append(
            f"Warning: the first play is of {_format_moment(manifest.first_play)}, possibly from a wrong clock. Such a "
            "play lengthens the time range that `rayrec split` divides."
        )
    return CommandOutput(data, views)


def _import_views(summary: Mapping[str, Any]) -> list[RenderableType]:
    """Return views of what the last import read and rejected; none if no files were imported."""
    if not summary:
        return []
    values: dict[str, Any] = {"files": summary["files"], "bytes": size(summary["bytes"])}
    if summary["rows_per_file"] and summary["files"] > 1:
        least, median, most = (number(count) for count in summary["rows_per_file"])
        values["rows per file (least, median, most)"] = f"{least}, {median}, {most}"
    views: list[RenderableType] = [values_view("Files", values)]
    if summary["outliers"]:
        views.append(table("Files that differ from the others", ["file", "rows"], list(summary["outliers"].items())))
    if summary["damaged"]:
        views.append("\n".join(["Files left out", *summary["damaged"].values()]))
    rejected = summary["reasons"]
    if rejected:
        rows = [[rejection["reason"], rejection["rows"], f"{rejection['share']:.1%}"] for rejection in rejected]
        views.append(table("Rejected rows", ["reason", "rows", "share"], rows))
        views.append("\n".join(rejected_examples(summary)))
    views += [f"Warning: {warning}" for warning in summary["warnings"]]
    return views


def _split_validity(split: Split | None, dataset: Dataset) -> tuple[str, bool]:
    """Return a text about the current split after plays were appended, and True if the split stays valid."""
    if split is None or not split.has_test:
        return "", True
    if holds_for(dataset, split):
        return f"Split {split.id} stays valid: training uses all plays except {split.test_range}.", True
    return f"split {split.id} is not valid for the new plays; run `rayrec split --last-fraction N` again", False


def _append_output(appended: Any, split_validity: tuple[str, bool]) -> CommandOutput:
    new_counts = {"plays": appended.plays, "users": appended.users, "songs": appended.songs}
    like_counts = {"likes": appended.likes} if appended.dataset.has_likes else {}
    outcome_counts = {
        "read": appended.read,
        **like_counts,
        "merged": appended.merged,
        "rejected": sum(appended.rejected.values()),
    }
    views: list[Any] = [
        values_view("Appended", {f"new {name}": count for name, count in new_counts.items()} | outcome_counts)
    ]
    if not (appended.plays or appended.new_likes):
        views.append("No new plays: the data set is unchanged.")
    if (file_count := len(appended.dataset.spans)) > PARTS_BEFORE_COMPACT:
        views.append(f"Each bucket of users has {file_count} files; `rayrec compact` joins them.")
    text, is_valid = split_validity
    if text:
        views.append(text if is_valid else f"Warning: {text}.")
    dataset_output = _dataset_output(appended.dataset)
    data = {
        **dataset_output.data,
        **({} if is_valid else {"warnings": [text]}),
        "appended": {**new_counts, **outcome_counts, "reasons": appended.rejected},
        "import": appended.last_import,
    }
    return CommandOutput(data, [*views, *_import_views(appended.last_import), dataset_output.views[0]])


def _format_cut(value: int | float | str) -> str:
    return _format_moment(value) if isinstance(value, int) else str(value)


def _format_moment(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
