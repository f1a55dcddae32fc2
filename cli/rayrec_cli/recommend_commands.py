"""recommend, evaluate: what the models of a workspace recommend, and how well."""

import textwrap
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from rayrec.data.dataset import Dataset
from rayrec.data.moments import format_iso, now_ms, parse_timestamp
from rayrec.data.split import Split, choose_split, holds_for, load_split
from rayrec.errors import InputError
from rayrec.evaluation.evaluator import PrefixFile
from rayrec.evaluation.protocol import DAYS, DEFAULT_CONFIG, EvaluateConfig, usual_k
from rayrec.evaluation.results import ABLATION
from rayrec.recommend.answer import Answer, RecommendConfig, answer, load_recommender
from rayrec.storage.artifacts import latest, load_manifest
from rayrec.storage.releases import ANSWERING_KINDS, KIND, default_parts, parts_of
from rayrec.storage.workspace import Workspace
from rayrec_cli.app import (
    Call,
    CommandOutput,
    ForceOption,
    app,
    command,
    inputs_view,
    interval,
    note,
    number,
    table,
    values_view,
)

SHOWN_IDS = 5  # of the songs that are not in the catalog
TEXT_WIDTH = 80  # columns

UserOption = Annotated[str | None, typer.Option("--user", metavar="ID", help="User ID.")]
SongsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--songs",
        metavar="ID,ID",
        help="Recommend after these songs instead, as if just played; repeat the option for IDs with commas.",
    ),
]
ArtistsOption = Annotated[
    list[str] | None,
    typer.Option("--artists", metavar="NAME", help="Only songs of this artist; repeat the option for several."),
]
ExcludeOption = Annotated[list[str] | None, typer.Option("--exclude", metavar="ID,ID", help="Songs to leave out.")]
AllowOption = Annotated[
    list[str] | None, typer.Option("--allow", metavar="ID,ID", help="The only songs to recommend. [default: all]")
]
AllOption = Annotated[bool, typer.Option("--all", help="Recommend to all users instead, and write Parquet files.")]
AtOption = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="TIME",
        help="Time of the request, ISO 8601 with zone or Unix time. [default: now; --all: after the last play]",
    ),
]
ServedModelOption = Annotated[
    str | None, typer.Option("--model", metavar="ID", help="Model. [default: that of the live release, else current]")
]
EvaluatedOption = Annotated[
    str | None, typer.Option("--model", metavar="ID", help="Model to evaluate. [default: current]")
]
TestSplitOption = Annotated[
    str | None, typer.Option("--split", metavar="ID", help="Split to evaluate on. [default: the model's]")
]
PrefixesOption = Annotated[
    str | None, typer.Option("--prefixes", metavar="FILE", help="Predict the targets in this file of prefixes instead.")
]
ItemSeparatorOption = Annotated[
    str,
    typer.Option(
        "--item-separator",
        metavar="TEXT",
        help="Separator between songs in a prefix. [default: a space]",
        show_default=False,
    ),
]
TargetSeparatorOption = Annotated[
    str,
    typer.Option(
        "--target-separator",
        metavar="TEXT",
        help="Separator before the target. [default: a tab, \\t]",
        show_default=False,
    ),
]


@command(app, "recommend", config=RecommendConfig, example="rayrec recommend --user ann -k 10 --at 2015-01-20T18:30Z")
def recommend(
    call: Call,
    config: RecommendConfig,
    *,
    user: UserOption = None,
    songs: SongsOption = None,
    artists: ArtistsOption = None,
    exclude: ExcludeOption = None,
    allow: AllowOption = None,
    everybody: AllOption = False,
    at: AtOption = None,
    model: ServedModelOption = None,
    force: ForceOption = False,
) -> CommandOutput:
    """Recommend songs to a user, after given songs, or to all users.

    Songs given by --songs count as played three minutes apart, the last one three minutes before --at. Songs that are
    not in the catalog are left out. If no play is known, for example of an unknown user, popular songs are recommended.
    With --all the songs for every user are written as Parquet, one row per user; a killed run continues with the
    missing buckets.
    """
    at_ms = None if at is None else parse_timestamp(at)
    if everybody:
        _refuse_filters(config, {"user": user, "songs": songs, "artists": artists, "exclude": exclude, "allow": allow})
    dataset = Dataset(call.workspace)
    parts = default_parts(call.workspace, model)
    if everybody:
        return _recommend_all(call, config, parts, at_ms, force)
    catalog = dataset.catalog()

    def split_ids(texts: list[str] | None) -> list[str] | None:
        return [song for text in texts for song in catalog.listed(text)] if texts else None

    recommender = load_recommender(call.workspace, dataset, parts)
    result = answer(
        dataset,
        recommender,
        config,
        parts=parts,
        at=now_ms() if at_ms is None else at_ms,
        user=user,
        songs=split_ids(songs),
        artists=artists or (),
        exclude=split_ids(exclude) or (),
        allow=split_ids(allow),
    )
    if result.unknown_songs:
        shown_ids = ", ".join(result.unknown_song_ids[:SHOWN_IDS])
        note(f"{result.unknown_songs:,} songs are not in the catalog and were left out: {shown_ids}")
    subject = "these songs" if user is None else f"user {user}"
    if result.source == "popular":
        note(f"No play of {subject} is known; popular songs are recommended")
    inputs = {"dataset": dataset.manifest.id, **_answering_parts(parts)}
    return CommandOutput(
        {**result.to_mapping(), "inputs": inputs}, [*answer_view(result, subject), inputs_view(inputs)]
    )


def _answering_parts(parts: dict[str, str]) -> dict[str, str]:
    """Return role -> id of the release that answers and of its model; without a release, of all parts that answer."""
    roles = (KIND, "models") if KIND in parts else ANSWERING_KINDS
    return {role: parts[role] for role in roles if role in parts}


def _refuse_filters(config: RecommendConfig, options: dict[str, Any]) -> None:
    """Raise `InputError` if an option is given that --all does not accept."""
    refused_settings = ("released_from", "released_to", "market", "diversity", "explain")
    given_names = [name for name, value in options.items() if value]
    given_names += [name for name in refused_settings if getattr(config, name)]
    if given_names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given_names)
        raise InputError(f"--all recommends to all users from all songs; leave out {flags}")


def _recommend_all(
    call: Call, config: RecommendConfig, parts: dict[str, str], at: int | None, force: bool
) -> CommandOutput:
    """Write the recommended songs for every user."""
    from rayrec.jobs.recommend_all import recommend_all as job

    manifest = job(call.workspace, config, parts, at=at, repeat=force)
    folder = call.workspace.uri_of(manifest.folder)
    data = {
        "id": manifest.id,
        "folder": folder,
        "at": format_iso(manifest.config["at"]),
        "k": manifest.config["k"],
        **manifest.metrics,
    }
    inputs = {**manifest.inputs, **_answering_parts(parts)}
    return CommandOutput(
        {**data, "inputs": inputs}, [values_view("Recommendations for all users", data), inputs_view(inputs)]
    )


def answer_view(recommended: Answer, subject: str) -> list[RenderableType]:
    """Return views of the last plays and of the songs recommended after them."""
    title = f"Last plays of {subject}, {recommended.plays:,} in total"
    last_plays_views: list[RenderableType] = []
    if recommended.plays:
        last_plays_views = [table(title, ["song"], [[song.name] for song in recommended.last_plays])]
    headers = ["#", "song", "score"]
    rows = [[rank, song.name, song.score] for rank, song in enumerate(recommended.songs, 1)]
    if any(song.explored for song in recommended.songs):
        headers = [*headers, "explored with probability"]
        rows = [[*row, song.probability or ""] for row, song in zip(rows, recommended.songs, strict=True)]
    songs_title = "Popular songs" if recommended.source == "popular" else "Recommended"
    views = [*last_plays_views, table(songs_title, headers, rows, left=["song"])]
    reason_lines = [
        f"{rank}. {'; '.join(song.reasons)}" for rank, song in enumerate(recommended.songs, 1) if song.reasons
    ]
    return [*views, "\n".join(["Reasons", *reason_lines])] if reason_lines else views


@command(app, "evaluate", config=EvaluateConfig, example="rayrec evaluate --models taste,popularity,sequential-rules")
def evaluate(
    call: Call,
    config: EvaluateConfig,
    *,
    model: EvaluatedOption = None,
    split: TestSplitOption = None,
    prefixes: PrefixesOption = None,
    item_separator: ItemSeparatorOption = " ",
    target_separator: TargetSeparatorOption = "\\t",
    force: ForceOption = False,
) -> CommandOutput:
    """Compare two-step, the network and baselines on the test range.

    Predicts every play of the test range after a user's first, over the full catalog. With --prefixes it predicts the
    targets in a file instead; each line has song IDs, a tab and the ID of the next song.
    """
    from rayrec.evaluation.report import read_results
    from rayrec.jobs.evaluate import evaluate as job

    parts = _parts_to_evaluate(call, model)
    if prefixes is not None:
        if config.ablation:
            raise InputError("--ablation evaluates the test range; leave out --prefixes")
        prefix_file = PrefixFile(path=prefixes, item_separator=item_separator, target_separator=target_separator)
        return _evaluate_prefixes(call, config, prefix_file, split, parts, force)
    selected_split = (
        choose_split(call.workspace, split) if split is not None else _split_for_evaluation(call.workspace, parts)
    )
    if selected_split is not None and not selected_split.has_test:  # a model for production: try the current split
        selected_split = choose_split(call.workspace)
    report = job(call.workspace, config, split=selected_split, model_id=parts.get("models"), repeat=force)
    data = {"id": report.id, **read_results(call.workspace, report)}
    warnings = [f"Warning: {data['warning']}"] if data.get("warning") else []
    report_line = f"Report: {call.workspace.uri_of(report.path('report.html'))}"
    ablation = [results_table(data, config, ablation=True)] if config.ablation else []
    views = [
        results_table(data, config),
        *ablation,
        *score_notes(data),
        *warnings,
        inputs_view(report.inputs),
        report_line,
    ]
    return CommandOutput({**data, "inputs": report.inputs}, views)


def _split_for_evaluation(workspace: Workspace, parts: Mapping[str, str]) -> Split | None:
    """Return the split of a model, or the current one if plays were added for which the model's split is not valid."""
    split = load_split(workspace, parts["split"]) if "split" in parts else None
    return split if split is not None and holds_for(Dataset(workspace), split) else choose_split(workspace)


def _evaluate_prefixes(
    call: Call,
    config: EvaluateConfig,
    prefix_file: PrefixFile,
    split: str | None,
    parts: Mapping[str, str],
    force: bool,
) -> CommandOutput:
    """Evaluate on the pairs of a file; the models may have been trained on all plays."""
    from rayrec.evaluation.report import read_results
    from rayrec.jobs.evaluate import evaluate_prefixes as job

    model_split = _split_for_evaluation(call.workspace, parts) if "split" in parts else None
    selected_split = choose_split(call.workspace, split) if split is not None else model_split
    report = job(call.workspace, config, prefix_file, split=selected_split, model_id=parts.get("models"), repeat=force)
    data = {"id": report.id, **read_results(call.workspace, report)}
    counts = {name: data[name] for name in ("pairs", "unknown_targets", "unknown_items")}
    report_line = f"Report: {call.workspace.uri_of(report.path('report.html'))}"
    pairs = values_view("Pairs of prefix and target", counts)
    views = [results_table(data, config), *score_notes(data), pairs, inputs_view(report.inputs), report_line]
    return CommandOutput({**data, "inputs": report.inputs}, views)


# Target, metric and title of each column; models are sorted by the first column.
COLUMNS = (
    ("served", "recall", "served"),
    ("served", "mrr", "MRR"),
    ("next", "recall", "all"),
    ("next", "mrr", "MRR"),
    ("next_repeat", "recall", "repeats"),
    ("offsets25_50", "recall", "25-50"),
)


def _days_title(target: str) -> str:
    """Return the title of a column of a target in days: "0-7 d" for days0_7."""
    return f"{target.removeprefix(DAYS).replace('_', '-')} d"


def results_table(
    data: dict[str, Any], config: EvaluateConfig = DEFAULT_CONFIG, *, ablation: bool = False
) -> RenderableType:
    """Return a table of metrics with one line per model, the highest recall as served first.

    It has confidence intervals if `config` computes them. Metrics are at 20, or at the largest k if 20 was not
    evaluated. With `ablation`, the lines are the default model and the same model without each of its parts.
    """
    k = usual_k([row["k"] for row in data["results"]])
    results = [
        row
        for row in data["results"]
        if (row["users"], row["k"]) == ("all", k)
        and ((row["kind"] == ABLATION) == ablation or (ablation and row["model"] == data["default"]))
    ]
    values = {(row["model"], row["target"], row["metric"]): row for row in results}
    targets = list(dict.fromkeys(row["target"] for row in results))
    day_columns = [(target, "recall", _days_title(target)) for target in targets if target.startswith(DAYS)]
    columns = [column for column in (*COLUMNS, *day_columns) if column[0] in targets]
    sort_column = columns[0][:2]
    models = sorted({row["model"] for row in results}, key=lambda name: -values[(name, *sort_column)]["value"])
    rows = []
    for name in models:
        cells = [number(values[(name, *column[:2])]["value"]) for column in columns]
        model_title = f"{name} *" if name == data["default"] else name
        sorted_row = values[(name, *sort_column)]
        intervals = [interval(sorted_row.get("low"), sorted_row.get("high"))] if config.interval_title else []
        rows.append([model_title, cells[0], *intervals, *cells[1:]])
    titles = [title for _, _, title in columns]
    title = f"Recall@{k} and MRR@{k} over the full catalog (* is used by `recommend`)"
    if ablation:
        title = f"Ablation: recall@{k} and MRR@{k} without each part"
    interval_titles = [config.interval_title] if config.interval_title else []
    return table(title, ["model", titles[0], *interval_titles, *titles[1:]], rows)


def score_notes(data: dict[str, Any]) -> list[str]:
    """Return texts on the default model's calibration error and on the settings of baselines, in 80 columns."""
    from rayrec.evaluation.report import settings_text

    titles = {target: title for target, metric, title in COLUMNS if metric == "recall"}
    errors = [
        f"{titles[entry['target']]} {number(entry['value'])}"
        for entry in data.get("calibration", [])
        if entry["model"] == data["default"]
    ]
    settings = [
        f"{entry['model']}: {settings_text({name: value for name, value in entry.items() if name != 'model'})}"
        for entry in data["settings"]
    ]
    lines = [textwrap.fill(text, TEXT_WIDTH, initial_indent="  ", subsequent_indent="    ") for text in settings]
    return [
        *([f"Expected calibration error of {data['default']}: {', '.join(errors)}"] if errors else []),
        *(["\n".join(["Settings of the baselines", *lines])] if lines else []),
    ]


def _parts_to_evaluate(call: Call, model: str | None) -> dict[str, str]:
    """Return the parts of the model to evaluate, by default of the current one, live or not; empty without a model."""
    dataset = Dataset(call.workspace)
    if model is None:
        network = latest(call.workspace, "models", lambda manifest: dataset.descends_from(manifest.inputs["dataset"]))
    else:
        network = load_manifest(call.workspace, "models", model)
    return {} if network is None else parts_of(call.workspace, network)
