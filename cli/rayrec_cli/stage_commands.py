"""embed, train, songs, retrieval, rank, taste, index, tune: one stage each; fit, update, run, demo: many at once."""

import shlex
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from rayrec.data.split import choose_split, describe_training_plays
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.errors import InputError
from rayrec.importing.import_plan import TooManyRejectedError
from rayrec.jobs.job_config import FitConfig, TuneConfig, UpdateConfig, read_sections, to_toml
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig
from rayrec.serving.serve_config import ServeConfig
from rayrec.storage.artifacts import FITTED, Manifest, noun
from rayrec_cli.app import (
    DEFAULT_WORKSPACE,
    Call,
    CommandOutput,
    ForceOption,
    ModelOption,
    app,
    command,
    day,
    inputs_view,
    interval,
    note,
    songs_app,
    table,
    values_view,
)
from rayrec_cli.data_commands import too_many_rejected
from rayrec_cli.recommend_commands import answer_view, results_table

SplitOption = Annotated[
    str | None,
    typer.Option("--split", metavar="ID", help="Train on the plays before this split's test range. [default: current]"),
]
NoSplitOption = Annotated[bool, typer.Option("--no-split", help="Train on all plays, as for production.")]
EmbeddingsOption = Annotated[
    str | None, typer.Option("--songs", metavar="ID", help="Song embeddings. [default: current]")
]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="ID", help="Start from the weights of this model; new songs are added to its song table."
    ),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint.")]

SpaceArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="TOML file with [embed] and [train]; a list gives the values to try.")
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Delete the unfinished training of these settings and start over.")
]

UNRELIABLE_QUERIES = 100  # with fewer queries the 95 % interval of recall is wider than about 0.2

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="TOML file with one section per stage.")]
PlaysArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH", help="Files of plays or folders of files, .gz too; local, s3:// or gs://."),
]
SettingsOption = Annotated[
    str | None,
    typer.Option(
        "--settings",
        metavar="FILE",
        help="TOML file of settings of the stages, one section per stage, such as [train]; settings of fit itself are "
        "in the file of --config.",
    ),
]
ForceFitOption = Annotated[bool, typer.Option("--force", help="Replace the existing plays and recompute all stages.")]
ForceRunOption = Annotated[
    bool, typer.Option("--force", help="Replace the existing plays or data set and recompute all stages.")
]


@command(app, "embed", config=EmbedConfig, example="rayrec embed --dim 64 --epochs 30")
def embed(
    call: Call,
    config: EmbedConfig,
    *,
    split: SplitOption = None,
    no_split: NoSplitOption = False,
    force: ForceOption = False,
) -> CommandOutput:
    """Train or import song embeddings.

    Trains word2vec on playlists or sessions, or reads vectors from a file.
    """
    from rayrec.jobs.embed import embed as job

    selected_split = choose_split(call.workspace, split, no_split=no_split)
    return artifact_view(call, job(call.workspace, config, split=selected_split, repeat=force), "Song embeddings")


@command(app, "train", config=TrainConfig, example="rayrec train --epochs 8 --hidden-dim 128")
def train(
    call: Call,
    config: TrainConfig,
    *,
    songs: EmbeddingsOption = None,
    split: SplitOption = None,
    no_split: NoSplitOption = False,
    start: FromOption = None,
    resume: ResumeOption = False,
    restart: RestartOption = False,
    force: ForceOption = False,
) -> CommandOutput:
    """Train the taste network."""
    from rayrec.jobs.train import Unfinished
    from rayrec.jobs.train import train as job

    if resume and restart:
        raise InputError("--resume and --restart exclude each other; pass only one of them")
    unfinished: Unfinished = "resume" if resume else "restart" if restart else "ask"
    selected_split = choose_split(call.workspace, split, no_split=no_split)
    model = job(
        call.workspace, config, songs_id=songs, split=selected_split, from_id=start, unfinished=unfinished, repeat=force
    )
    return artifact_view(call, model, "Model")


@command(app, "retrieval", config=RetrievalConfig, example="rayrec retrieval")
def retrieval(
    call: Call,
    config: RetrievalConfig,
    *,
    split: SplitOption = None,
    no_split: NoSplitOption = False,
    force: ForceOption = False,
) -> CommandOutput:
    """Fit the retrievers: sessions, sequential rules, play counts."""
    from rayrec.jobs.retrieval import fit_retrieval as job

    selected_split = choose_split(call.workspace, split, no_split=no_split)
    return artifact_view(call, job(call.workspace, config, split=selected_split, repeat=force), "Retrieval")


@command(app, "rank", config=RankConfig, example="rayrec rank")
def rank(
    call: Call,
    config: RankConfig,
    *,
    model: ModelOption = None,
    retrieval: Annotated[
        str | None, typer.Option("--retrieval", metavar="ID", help="Fitted retrievers. [default: current]")
    ] = None,
    force: ForceOption = False,
) -> CommandOutput:
    """Train the rankers on the validation range."""
    from rayrec.jobs.rank import fit_rankers as job

    return artifact_view(
        call, job(call.workspace, config, model_id=model, retrieval_id=retrieval, repeat=force), "Rankers"
    )


@command(songs_app, "add", example="rayrec songs add")
def add_songs(call: Call, *, model: ModelOption = None, force: ForceOption = False) -> CommandOutput:
    """Estimate embeddings of new songs from artist, album and content.

    For songs without plays in training, including songs known only from `rayrec describe`. The network and the index
    do not change. Run rayrec taste and rayrec release create afterwards; then the new songs are recommended. rayrec
    rank learns how to rank them, and rayrec evaluate measures how well they are recommended.
    """
    from rayrec.jobs.add_songs import add_songs as job

    return artifact_view(call, job(call.workspace, model_id=model, repeat=force), "Added songs")


@command(app, "taste", config=TasteConfig, example="rayrec taste")
def taste(call: Call, config: TasteConfig, *, model: ModelOption = None, force: ForceOption = False) -> CommandOutput:
    """Compute the taste vectors of all users."""
    from rayrec.jobs.taste import compute_tastes as job

    return artifact_view(call, job(call.workspace, config, model_id=model, repeat=force), "Taste vectors")


@command(app, "index", config=IndexConfig, example="rayrec index")
def index(call: Call, config: IndexConfig, *, model: ModelOption = None, force: ForceOption = False) -> CommandOutput:
    """Build the nearest-neighbor index."""
    from rayrec.jobs.build_index import build_index as job

    return artifact_view(call, job(call.workspace, config, model_id=model, repeat=force), "Index")


@command(app, "tune", config=TuneConfig, example="rayrec tune space.toml --trials 20 --seed 1")
def tune(
    call: Call, config: TuneConfig, *, file: SpaceArgument, split: SplitOption = None, force: ForceOption = False
) -> CommandOutput:
    """Search for the best settings of embeddings and network.

    Each combination is trained on plays before the validation range and evaluated on it. An interrupted search resumes.
    The best settings are printed as sections for `rayrec run`.
    """
    from rayrec.jobs.tune import tune as job
    from rayrec.model.epochs import SELECTION_METRIC

    def report(row: dict[str, Any], trials: int) -> None:
        outcome = "diverged" if row[SELECTION_METRIC] is None else f"{SELECTION_METRIC} {row[SELECTION_METRIC]:.4f}"
        note(f"trial {row['trial']} of {trials}: {outcome} ({row['seconds']:,.1f} s)")

    selected_split = choose_split(call.workspace, split)
    tuning = job(call.workspace, config, file, split=selected_split, repeat=force, on_trial=report)
    ranked_trials = sorted(
        tuning.metrics["trials"], key=lambda row: 1.0 if row[SELECTION_METRIC] is None else -row[SELECTION_METRIC]
    )
    columns = [name for name in ranked_trials[0] if name not in ("settings", "songs", "songs_made")]
    rows = [[(_format_setting if "." in name else _join_list)(row[name]) for name in columns] for row in ranked_trials]
    table_text = f"Table: {call.workspace.uri_of(tuning.path('trials.csv'))}"
    headers = [name.removeprefix("validation_") for name in columns]
    views = [
        table("Trials, best first", headers, rows),
        table_text,
        f"Best settings:\n\n{to_toml(tuning.metrics['best'])}",
    ]
    return CommandOutput(
        {"id": tuning.id, "inputs": tuning.inputs, **tuning.metrics}, [*views, inputs_view(tuning.inputs)]
    )


def artifact_view(call: Call, manifest: Manifest, title: str) -> CommandOutput:
    """Return views of an artifact: id, inputs, metrics, and the plays it was trained on; lists of records as tables."""
    metrics = dict(manifest.metrics)
    remarks = {kind: metrics.pop(kind, None) for kind in ("warning", "note")}
    views: list[RenderableType] = [values_view(title, {"id": manifest.id, **metrics}), inputs_view(manifest.inputs)]
    for name, value in metrics.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            views.append(_records_table(name, value))
    data = {"id": manifest.id, "inputs": manifest.inputs, **manifest.metrics}
    if manifest.kind in FITTED:
        data["trained_on"] = describe_training_plays(call.workspace, manifest)
        views.append(f"Trained on {data['trained_on']}.")
    if manifest.created_at < call.started:
        views.append(f"Reused the result of {day(manifest.created_at)} UTC; --force recomputes it.")
    views += [f"{kind.capitalize()}: {remark}" for kind, remark in remarks.items() if remark]
    return CommandOutput(data, views)


def _records_table(name: str, records: list[dict[str, Any]]) -> RenderableType:
    """Return a table of records.

    A list of texts shows only its first text, and lists of numbers are left out; --json has all of them.
    """
    headers = [key for key, value in records[0].items() if not (isinstance(value, list) and _are_numbers(value))]
    texts = [header for header in headers if isinstance(records[0][header], str | list)]
    rows = [[_cell(record.get(header)) for header in headers] for record in records]
    return table(name.replace("_", " ").capitalize(), headers, rows, left=texts)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _cell(value: Any) -> Any:
    return str(next(iter(value), "")) if isinstance(value, list) else value


def _join_list(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _format_setting(value: Any) -> Any:
    """Return a setting as a user writes it: 1e-5 must not become 0.000."""
    return f"{value:g}" if isinstance(value, float) else _join_list(value)


@command(app, "fit", config=FitConfig, arguments={"paths": PlaysArgument}, example="rayrec fit plays.csv")
def fit(
    call: Call, config: FitConfig, *, settings: SettingsOption = None, force: ForceFitOption = False
) -> CommandOutput:
    """Import plays, train, evaluate and release in one command.

    Format and columns are guessed. The newest plays are used for validation; then all models are trained on all plays,
    and their release goes live.
    """
    from rayrec.jobs.fit import fit as job

    sections = {} if settings is None else read_sections(settings)
    try:
        result = job(call.workspace, config, settings=sections, force=force, on_stage=note_stage, on_note=note)
    except TooManyRejectedError as error:
        return too_many_rejected(error)
    views = [stages_table(result.outcomes), *quality_views(result), *answer_view(result.answer, f"user {result.user}")]
    return CommandOutput(result.to_mapping(), [*views, _next_steps(call, result.user)])


def quality_views(result: Any) -> list[RenderableType]:
    """Return views of the quality of a fit on the validation range; none if it was not measured."""
    if result.quality is None:
        return []
    quality, title = result.quality, f"Validation: recall@20 and MRR@20 on {result.split.validation_range}"
    rows = [
        [name, value, interval(low, high), *other_values] for name, value, low, high, *other_values in quality.table()
    ]
    warning = (
        f" Fewer than {UNRELIABLE_QUERIES} plays: the estimate is unreliable."
        if quality.queries < UNRELIABLE_QUERIES
        else ""
    )
    text = (
        f"Measured with models that were not trained on this range, on {quality.queries:,} plays of songs new to the "
        f"user (served) and on all plays.{warning} The models of the release were then trained on all plays."
    )
    return [table(title, ["model", "served", "95 %", "MRR", "all", "MRR"], rows), text]


def _next_steps(call: Call, user: str) -> str:
    """Return a text with the commands to run after a fit."""
    commands = {
        f"recommend --user {shlex.quote(user)} -k 10": "songs for a user",
        "serve": "the HTTP server and its page",
        "update NEW_PLAYS": "every day, with the new plays",
        "run FILE": "with own settings and a test range",
    }
    width = max(map(len, commands))
    workspace_lines = [] if call.uri == DEFAULT_WORKSPACE else [f"  export RAYREC_WORKSPACE={shlex.quote(call.uri)}"]
    return "\n".join(
        [
            "Next:",
            *workspace_lines,
            *(f"  rayrec {arguments:{width}}  {description}" for arguments, description in commands.items()),
        ]
    )


@command(
    app,
    "update",
    config=UpdateConfig,
    arguments={"paths": PlaysArgument},
    example="rayrec update plays/day=2026-01-20",
)
def update(call: Call, config: UpdateConfig) -> CommandOutput:
    """Add new plays and make a new release, for daily use.

    Appends the plays, updates retrieval and taste vectors, continues the training if many plays are new, and compares
    the new release with the live one on the newest plays. It goes live unless its recall@20 as served is lower by more
    than 0.005 (with the same model, also by more than chance); then the exit code is 1.
    """
    from rayrec.jobs.update import update as job

    try:
        result = job(call.workspace, config, on_stage=note_stage, on_note=note)
    except TooManyRejectedError as error:
        return too_many_rejected(error)
    appended = result.appended
    new_counts = {"new plays": result.new_plays, "new users": result.new_users, "new songs": result.new_songs}
    state_counts = {} if result.states is None else {"states loaded": result.states.users}
    views: list[RenderableType] = [
        values_view("Update", {**new_counts, "merged": appended.merged, "trained": result.trained, **state_counts})
    ]
    if result.outcomes:
        views.append(stages_table(result.outcomes))
    state = "is live" if result.live else "is not live; the earlier release stays live"
    views.append(f"Release {result.release} {state}: {result.reason}.")
    if not result.live:
        # Without states, a server knows no user who is new in the release. An address may hold a password.
        store_option = " --store STORE" if config.store else ""
        views.append(
            f"To make it live anyway, run `rayrec states load --release {result.release}{store_option}`, then "
            f"`rayrec release activate {result.release}`."
        )
    return CommandOutput(result.to_mapping(), views, exit_code=0 if result.live else 1)


@command(app, "run", example="rayrec run pipeline.toml")
def run(call: Call, *, file: FileArgument, force: ForceRunOption = False) -> CommandOutput:
    """Run the full pipeline from a TOML file.

    Stages whose inputs and settings are unchanged are skipped. Without a section [split] there is no test range: the
    newest plays are the validation range, and the final models are trained on all plays.
    """
    from rayrec.jobs.pipeline import run as job

    try:
        outcomes = job(call.workspace, file, force=force, on_stage=note_stage, on_note=note)
    except TooManyRejectedError as error:
        return too_many_rejected(error)
    return CommandOutput({"stages": [outcome.to_mapping() for outcome in outcomes]}, [stages_table(outcomes)])


def note_stage(outcome: Any) -> None:
    """Print a finished stage on stderr."""
    reason = ", unchanged" if outcome.status == "skipped" else f": {outcome.reason}" if outcome.reason else ""
    plays_text = f", trained on {outcome.trained_on}" if outcome.trained_on else ""
    note(f"{outcome.stage}: {outcome.status}{reason} ({outcome.seconds:,.1f} s){plays_text}")


def stages_table(outcomes: list[Any]) -> RenderableType:
    """Return a table of the outcome of each stage, with one line per input."""
    rows = []
    for outcome in outcomes:
        inputs = [f"{noun(role)} {artifact_id}" for role, artifact_id in outcome.inputs.items()] or [""]
        rows.append([outcome.stage, outcome.status, outcome.id, f"{outcome.seconds:,.1f}", inputs[0]])
        rows += [["", "", "", "", text] for text in inputs[1:]]
    return table("Stages", ["stage", "status", "id", "seconds", "from"], rows, left=["status", "id", "from"])


@command(app, "demo", example="rayrec demo")
def demo(call: Call, *, force: ForceOption = False) -> CommandOutput:
    """Run the full pipeline on synthetic data.

    Runs every stage, compares two-step and the network with the baselines and recommends songs to one user. A second
    run in the same workspace skips completed stages.
    """
    from rayrec.jobs.pipeline import demo as job

    result = job(call.workspace, force=force, on_stage=note_stage)
    views = [
        stages_table(result.outcomes),
        results_table(result.evaluation),
        *answer_view(result.answer, result.user),
        f"Report: {result.report}",
        _page_text(call),
    ]
    return CommandOutput(result.to_mapping(), views)


def _page_text(call: Call) -> str:
    """Return a text with the address of the page and the command that serves it."""
    workspace_option = "" if call.uri == DEFAULT_WORKSPACE else f"--workspace {shlex.quote(call.uri)} "
    config = ServeConfig()
    return f"Page: run `rayrec {workspace_option}serve` and open http://{config.host}:{config.port}/"
