"""embed, train, taste, index: from a data set to vectors that answer."""

from typing import Annotated, Any

import typer
from rich.console import RenderableType

from rayrec.data.split import choose_split
from rayrec.embeddings.embed_config import EmbedConfig
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.recommend.index import IndexConfig
from rayrec.storage.artifacts import Manifest
from rayrec_cli.app import app
from rayrec_cli.options import Call, ForceOption, command
from rayrec_cli.output import Shown, figures, table

SplitOption = Annotated[
    str | None, typer.Option("--split", metavar="ID", help="Fit before this split's cut (the newest split).")
]
NoSplitOption = Annotated[bool, typer.Option("--no-split", help="Fit on all plays, as production does.")]
SongsOption = Annotated[str | None, typer.Option("--songs", metavar="ID", help="Song vectors to start from (newest).")]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="ID", help="Model to work with (newest).")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the same training.")]


@command(app, "embed", config=EmbedConfig, example="rayrec embed --dim 64 --epochs 30")
def embed(
    call: Call,
    config: EmbedConfig,
    *,
    split: SplitOption = None,
    no_split: NoSplitOption = False,
    force: ForceOption = False,
) -> Shown:
    """Make song vectors.

    By word2vec from playlists or sessions, or from a file of outside vectors.
    """
    from rayrec.jobs.embed import embed as job

    chosen = choose_split(call.workspace, split, no_split=no_split)
    return shown(job(call.workspace, config, split=chosen, repeat=force), "Song vectors")


@command(app, "train", config=TrainConfig, example="rayrec train --epochs 8 --hidden-dim 128")
def train(
    call: Call,
    config: TrainConfig,
    *,
    songs: SongsOption = None,
    split: SplitOption = None,
    no_split: NoSplitOption = False,
    resume: ResumeOption = False,
    force: ForceOption = False,
) -> Shown:
    """Train the taste network on windows of histories."""
    from rayrec.jobs.train import train as job

    chosen = choose_split(call.workspace, split, no_split=no_split)
    made = job(call.workspace, config, songs_id=songs, split=chosen, resume=resume, repeat=force)
    return shown(made, "Model")


@command(app, "taste", config=TasteConfig, example="rayrec taste")
def taste(call: Call, config: TasteConfig, *, model: ModelOption = None, force: ForceOption = False) -> Shown:
    """Compute the taste vectors of all users."""
    from rayrec.jobs.taste import compute_tastes as job

    return shown(job(call.workspace, config, model_id=model, repeat=force), "Tastes")


@command(app, "index", config=IndexConfig, example="rayrec index")
def index(call: Call, config: IndexConfig, *, model: ModelOption = None, force: ForceOption = False) -> Shown:
    """Build the index over the vectors that a model scores against."""
    from rayrec.jobs.build_index import build_index as job

    return shown(job(call.workspace, config, model_id=model, repeat=force), "Index")


def shown(manifest: Manifest, title: str) -> Shown:
    """An artifact's figures; those that are lists of records become tables of their own."""
    metrics = dict(manifest.metrics)
    warning = metrics.pop("warning", None)
    views: list[RenderableType] = [figures(title, {"id": manifest.id, **metrics})]
    for name, value in metrics.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            views.append(_records(name, value))
    if warning:
        views.append(f"Warning: {warning}")
    return Shown({"id": manifest.id, **manifest.metrics}, views)


def _records(name: str, records: list[dict[str, Any]]) -> RenderableType:
    """A table of records; of a list of texts the first is shown, the rest and lists of numbers are left to --json."""
    headers = [key for key, value in records[0].items() if not (isinstance(value, list) and _numbers(value))]
    texts = [header for header in headers if isinstance(records[0][header], str | list)]
    rows = [[_cell(record.get(header)) for header in headers] for record in records]
    return table(name.replace("_", " ").capitalize(), headers, rows, left=texts)


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _cell(value: Any) -> Any:
    return str(next(iter(value), "")) if isinstance(value, list) else value
