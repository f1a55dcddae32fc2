"""recommend, evaluate, status: what a workspace answers."""

from typing import Annotated, Any

import typer
from rich.console import RenderableType

from rayrec.data.dataset import Dataset
from rayrec.data.split import choose_split
from rayrec.data.status import KINDS
from rayrec.data.status import status as look
from rayrec.errors import InputError, NotFoundError
from rayrec.evaluation.prefixes import PrefixFile
from rayrec.evaluation.protocol import EvaluateConfig, usual_k
from rayrec.recommend.answer import Answer, RecommendConfig, answer, load_recommender, parse_moment
from rayrec.storage.releases import default_parts
from rayrec_cli.app import app
from rayrec_cli.options import Call, ForceOption, command
from rayrec_cli.output import Shown, day, figures, number, size, table

UserOption = Annotated[str | None, typer.Option("--user", metavar="ID", help="Recommend to this user.")]
SongsOption = Annotated[
    str | None, typer.Option("--songs", metavar="ID,ID", help="Or to whoever just played these songs.")
]
AtOption = Annotated[
    str | None, typer.Option("--at", metavar="TIME", help="Moment of the request: ISO 8601 with zone, or unix (now).")
]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="ID", help="Model (the live one, or newest).")]
SplitOption = Annotated[str | None, typer.Option("--split", metavar="ID", help="Split to test on (the model's own).")]
PrefixesOption = Annotated[
    str | None, typer.Option("--prefixes", metavar="FILE", help="Predict the targets of this file instead.")
]
ItemSeparatorOption = Annotated[
    str,
    typer.Option(
        "--item-separator", metavar="TEXT", help="Between the songs of a prefix (a space).", show_default=False
    ),
]
TargetSeparatorOption = Annotated[
    str,
    typer.Option("--target-separator", metavar="TEXT", help="Before the target (a tab, \\t).", show_default=False),
]


HEADLINES = (
    "validation_recall@20",
    "recall@20",
    "coverage",
    "mean_cosine",
    "kind",
    "recall",
    "users",
)  # of any kind of artifact


@command(app, "recommend", config=RecommendConfig, example="rayrec recommend --user ann -k 10 --at 2015-01-20T18:30Z")
def recommend(
    call: Call,
    config: RecommendConfig,
    *,
    user: UserOption = None,
    songs: SongsOption = None,
    at: AtOption = None,
    model: ModelOption = None,
) -> Shown:
    """Recommend songs.

    To a user of the data set, or to whoever has just played some songs: these are taken as played
    three minutes apart, the last of them at --at.
    """
    moment = parse_moment(at)
    listed = None if songs is None else [song.strip() for song in songs.split(",") if song.strip()]
    dataset = Dataset(call.workspace)
    parts = default_parts(call.workspace, model)
    recommender = load_recommender(call.workspace, dataset, model_id=parts["models"], index_id=parts.get("indexes"))
    told = answer(dataset, recommender, config, at=moment, user=user, songs=listed)
    return Shown(told.to_mapping(), recommendations(told, f"user {user}" if user else "those songs"))


def recommendations(told: Answer, who: str) -> list[RenderableType]:
    """The last plays and the songs recommended after them."""
    title = f"Last plays of {who}, {told.plays:,} in all"
    rows = [[rank, song, score] for rank, (song, score) in enumerate(zip(told.titles, told.scores, strict=True), 1)]
    played: list[RenderableType] = [table(title, ["song"], [[song] for song in told.last_plays])]
    return [*played, table("Recommended", ["#", "song", "score"], rows, left=["song"])]


@command(app, "evaluate", config=EvaluateConfig, example="rayrec evaluate --models taste,popularity,sequential-rules")
def evaluate(
    call: Call,
    config: EvaluateConfig,
    *,
    model: ModelOption = None,
    split: SplitOption = None,
    prefixes: PrefixesOption = None,
    item_separator: ItemSeparatorOption = " ",
    target_separator: TargetSeparatorOption = "\\t",
    force: ForceOption = False,
) -> Shown:
    """Measure the network against the baselines.

    Every play of the test range that has an earlier one by the same user is predicted, over the full catalog. With
    --prefixes it is the targets of a file: lines of song ids, a tab and the id of the song that followed.
    """
    from rayrec.evaluation.report import read_figures
    from rayrec.jobs.evaluate import evaluate as job

    parts = _parts(call, model)
    if prefixes is not None:
        file = PrefixFile(path=prefixes, item_separator=item_separator, target_separator=target_separator)
        return _evaluate_prefixes(call, config, file, split or parts.get("split"), parts.get("models"), force)
    chosen = choose_split(call.workspace, split or parts.get("split"))
    if chosen is None:
        raise InputError("there is no split to test on; run `rayrec split`, then embed, train and index again")
    report = job(call.workspace, config, split=chosen, model_id=parts.get("models"), repeat=force)
    data = {"id": report.id, **read_figures(call.workspace, report)}
    warnings = [f"Warning: {data['warning']}"] if data.get("warning") else []
    where = f"Report: {call.workspace.full(report.path('report.html'))}"
    return Shown(data, [results_table(data), *warnings, where])


def _evaluate_prefixes(
    call: Call, config: EvaluateConfig, file: PrefixFile, split: str | None, model: str | None, force: bool
) -> Shown:
    """Judge by the pairs of a file; without a split of the model's the models know all plays."""
    from rayrec.evaluation.report import read_figures
    from rayrec.jobs.evaluate_prefixes import evaluate_prefixes as job

    chosen = choose_split(call.workspace, split, no_split=split is None)
    report = job(call.workspace, config, file, split=chosen, model_id=model, repeat=force)
    data = {"id": report.id, **read_figures(call.workspace, report)}
    counts = {name: data[name] for name in ("pairs", "unknown_targets", "unknown_items")}
    where = f"Report: {call.workspace.full(report.path('report.html'))}"
    return Shown(data, [results_table(data), figures("Pairs of prefix and target", counts), where])


# Target, metric and title of each column; the first sorts the models.
COLUMNS = (
    ("served", "recall", "served"),
    ("served", "mrr", "MRR"),
    ("next", "recall", "all plays"),
    ("next", "mrr", "MRR"),
    ("next_repeat", "recall", "repeats"),
    ("offsets25_50", "recall", "25-50 ahead"),
)


def results_table(data: dict[str, Any]) -> RenderableType:
    """One line a model, the best recall as served first, with its interval, at 20."""
    usual = usual_k([row["k"] for row in data["results"]])
    results = [row for row in data["results"] if row["users"] == "all" and row["k"] == usual]
    values = {(row["model"], row["target"], row["metric"]): row for row in results}
    columns = [column for column in COLUMNS if any(row["target"] == column[0] for row in results)]
    first = columns[0][:2]
    models = sorted({row["model"] for row in results}, key=lambda name: -values[(name, *first)]["value"])
    rows = []
    for name in models:
        cells = [number(values[(name, *column[:2])]["value"]) for column in columns]
        shown = f"{name} *" if name == data["default"] else name
        rows.append([shown, cells[0], _interval(values[(name, *first)]), *cells[1:]])
    titles = [title for _, _, title in columns]
    title = f"Recall@{usual} and MRR@{usual} over the full catalog (* is what `recommend` uses)"
    return table(title, ["model", titles[0], "95 %", *titles[1:]], rows)


@command(app, "status", example="rayrec status")
def status(call: Call) -> Shown:
    """Say what the workspace holds."""
    data = look(call.workspace)
    dataset = data["dataset"]
    if dataset is None:
        views: list[RenderableType] = [f"Workspace {data['workspace']} holds no data set: see rayrec import --help."]
    else:
        names = ("id", "source", "plays", "users", "songs", "playlists", "rejected")
        shown = {name: dataset[name] for name in names} | {"size": size(dataset["bytes"])}
        views = [figures(f"Workspace {data['workspace']}", shown)]
    rows = [["split", split["id"], "", "", split.get("protocol", "")] for split in data["splits"]]
    for kind in KINDS:
        for item in data[kind]:
            told = "live" if item["id"] == data["active"] else _headline(item["figures"])
            rows.append([kind, item["id"], size(item["bytes"]), day(item["created_at"]), told])
    if rows:
        views.append(table("", ["kind", "id", "size", "created (UTC)", "figures"], rows, left=["id", "figures"]))
    return Shown(data, views)


def _headline(values: dict[str, Any]) -> str:
    """The figures that say most of an artifact, as many of them as it has."""
    found = [f"{name.replace('_', ' ')} {number(values[name])}" for name in HEADLINES if name in values]
    return ", ".join(found)


def _parts(call: Call, model: str | None) -> dict[str, str]:
    """What to evaluate; nothing where there is no model yet, for the baselines need none."""
    try:
        return default_parts(call.workspace, model)
    except NotFoundError:
        if model is not None:
            raise
        return {}


def _interval(row: dict[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return "" if low is None or high is None else f"{low:.3f}–{high:.3f}"
