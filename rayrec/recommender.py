"""The high-level Python interface: from a table of plays to a table of recommendations, without handling a workspace.

Shapes: U users, k songs per user, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs

from rayrec.config import from_mapping
from rayrec.data import columns as names
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import format_iso, now_ms, parse_timestamp
from rayrec.data.spelling import spell_id
from rayrec.display import html_values_table
from rayrec.errors import InputError, NotFoundError, first_line
from rayrec.jobs.job_config import FitConfig, UpdateConfig
from rayrec.model.train_config import TrainConfig
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import exclusive
from rayrec.storage.releases import active_release, read_active
from rayrec.storage.workspace import DATASET_MANIFEST, LOCK, LOCK_HOLDER, SENT_PLAYS, Workspace

if TYPE_CHECKING:
    from rayrec.jobs.fit import Quality
    from rayrec.jobs.pipeline import Outcome
    from rayrec.recommend.base import BaseRecommender, HorizonName

SHOWN_USERS = 5  # number of users without plays that a message names
COLUMNS = ("user_id", "rank", "song_id", "title", "artist", "score")

Plays = Any  # a pandas or polars DataFrame, an Arrow table, or the path of files
# Datetimes and pandas timestamps without a zone are UTC.
Moment: TypeAlias = str | int | float | np.integer[Any] | np.floating[Any] | np.datetime64 | date
Users: TypeAlias = str | int | UUID | Iterable[Any]  # an id, or ids: a list, a set, a column of pandas, polars or Arrow


class Recommender:
    """Learns from plays and recommends songs.

    >>> model = rayrec.Recommender(epochs=5).fit(plays)
    >>> model.recommend(users=["ann"], k=10)

    Plays have a user, a song and a time (a timestamp, Unix seconds or milliseconds, or ISO 8601), and may have title
    and artist. Columns are guessed by their names. Times without a zone are UTC, unless `fit` gets a `timezone`.
    Fitting runs on Ray: on this machine, or on the cluster to which `ray.init(address)` connected.
    """

    def __init__(self, *, workspace: str | Path | None = None, progress: bool = True, **settings: Any) -> None:
        """`settings` are those of `rayrec train`, such as epochs and hidden_dim.

        Everything is stored in `workspace`, a folder or an s3:// or gs:// prefix, by default in a temporary folder that
        is deleted with this object. On a cluster of several nodes, all nodes must be able to reach the workspace. With
        `progress`, a line on stderr reports each completed stage. Raises `InputError` for an unknown setting.
        """
        from_mapping(TrainConfig, settings, "Recommender")
        self.settings, self.progress = settings, progress
        self.quality: Quality | None = None  # measured on the newest plays; of the last fit or update that went live
        self._folder = tempfile.TemporaryDirectory(prefix="rayrec-") if workspace is None else None
        self.workspace = Workspace(self._folder.name if self._folder else workspace or "")
        self._loaded: tuple[Manifest, Dataset, BaseRecommender] | None = None  # a release and its recommender

    def fit(
        self,
        plays: Plays,
        *,
        columns: Mapping[str, str] | None = None,
        timezone: str = "UTC",
        user: str | None = None,
    ) -> Recommender:
        """Learn from plays: a pandas or polars DataFrame, an Arrow table, or a path; return this object.

        `columns` maps roles to column names that cannot be guessed: {"user": "member", "song": "track"}. `timezone` is
        the IANA name, such as Europe/Berlin, of the zone of times that have none. `user` is the user ID of all plays,
        for plays without user IDs. Settings are chosen and `quality` is measured on the newest plays; then everything
        is fitted on all plays. Plays of an earlier fit are replaced. Raises `InputError` for plays that cannot be read,
        for an unknown time zone, and on a cluster of several nodes if no workspace was given.
        """
        from rayrec.jobs.fit import fit

        self._require_reachable()
        self._loaded = None  # the data set changes, even if this fit does not end
        with exclusive(self.workspace, "fit"), _SentPlays(self.workspace, plays) as plays_settings:
            config = FitConfig(**plays_settings, columns=_column_names(columns), timezone=timezone, user=user)
            sections = {"train": self.settings}
            result = fit(
                self.workspace,
                config,
                settings=sections,
                force=self._replaces_dataset(config),
                **self._progress_callbacks(),
            )
        self.quality = result.quality
        return self

    def update(
        self,
        plays: Plays,
        *,
        columns: Mapping[str, str] | None = None,
        timezone: str | None = None,
        user: str | None = None,
        train: bool = False,
    ) -> Recommender:
        """Add new plays, users and songs; return this object.

        The training of the network continues if more than a tenth of all plays are new, or with `train`. If the result
        would be worse on the newest plays, the present model stays in use, and a line on stderr says so. Times without
        a zone are in `timezone`; `user` is the user ID of plays without user IDs. Both are by default those of the fit.
        """
        from rayrec.jobs.update import update

        self._require_reachable()
        self._loaded = None  # the data set changes, even if the live release stays
        with exclusive(self.workspace, "update"), _SentPlays(self.workspace, plays) as plays_settings:
            config = UpdateConfig(
                **plays_settings, columns=_column_names(columns), timezone=timezone, user=user, train=train
            )
            result = update(self.workspace, config, **self._progress_callbacks())
        if not result.live:
            _print(f"The update is not used: {result.reason}")
        elif result.outcomes:  # else no play was new, and the release with its quality stays
            self.quality = result.quality
        return self

    def recommend(
        self,
        users: Users,
        k: int = 10,
        *,
        at: Moment | None = None,
        horizon: HorizonName | float = "short",
        exclude_heard: bool = True,
    ) -> pd.DataFrame:
        """Return the `k` best songs of each user: columns user_id, rank (from 1), song_id, title, artist, score.

        `at` is the moment of the request, by default now; later plays are ignored. `horizon` is "short" for the next
        songs, "long" for later songs, or a number from 0 to 1 for a mix of both, with this weight for "long". With
        `exclude_heard`, songs that a user has heard are left out. A user without a known play before `at` gets the
        most played songs of recent time; a line on stderr says so. Raises `InputError` for an invalid horizon.
        """
        from rayrec.recommend.answer import load_popular_order
        from rayrec.recommend.base import weight_of_long
        from rayrec.recommend.filters import AnswerFilter, without_heard
        from rayrec.recommend.reranking import AnswerOptions, choose_for_users

        release, dataset, recommender = self._load_live_release()
        at_ms, user_ids = _to_ms(at), _list_ids(users)
        histories = self._histories(dataset, user_ids, at_ms)
        filters = without_heard(histories) if exclude_heard else [AnswerFilter()] * len(user_ids)
        try:
            weight = weight_of_long(horizon)
        except ValueError as error:
            raise InputError(f"horizon is {horizon!r}; {error}") from None
        options = [AnswerOptions(k=k, long_weight=weight, answer_filter=item) for item in filters]
        selections = choose_for_users(
            recommender, histories, at_ms, options, lambda: load_popular_order(dataset, recommender, release.inputs)
        )
        if not histories.lengths.all():
            users_without_plays = [user_ids[row] for row in np.flatnonzero(histories.lengths == 0).tolist()]
            shown_ids = ", ".join(map(repr, users_without_plays[:SHOWN_USERS])) + (
                ", ..." if len(users_without_plays) > SHOWN_USERS else ""
            )
            _print(
                f"No plays are known for {len(users_without_plays):,} of the users, who get popular songs: {shown_ids}"
            )
        counts = [len(item.songs) for item in selections]
        table = self._song_table(dataset, np.concatenate([item.songs for item in selections]))
        table.insert(0, "user_id", np.repeat(np.asarray(user_ids, dtype=object), counts))
        table.insert(1, "rank", np.concatenate([np.arange(1, count + 1) for count in counts]))
        table["score"] = np.concatenate([item.scores for item in selections])
        return table

    def similar(self, song: str, k: int = 10) -> pd.DataFrame:
        """Return the `k` songs most similar to a song: columns rank, song_id, title, artist, score.

        The score is the cosine of the embeddings of the two songs. Raises `InputError` for an unknown song.
        """
        from rayrec.recommend.reranking import network_of, similar

        _, dataset, recommender = self._load_live_release()
        row = int(dataset.catalog().rows([song])[0])
        vectors = network_of(recommender).song_vectors
        if row >= len(vectors) or not vectors[row].any():
            raise InputError(f"song {song!r} is newer than the network; call update with train=True first")
        selection = similar(recommender, row, k)
        table = self._song_table(dataset, selection.songs)
        table.insert(0, "rank", np.arange(1, len(table) + 1))
        table["score"] = selection.scores
        return table

    def taste(self, users: Users, *, at: Moment | None = None, horizon: HorizonName = "short") -> pd.DataFrame:
        """Return the taste vectors of users, float32 (U, D): one row per user, with an index named user_id.

        Raises `NotFoundError` for a user without a known play before `at`, `InputError` for an invalid horizon.
        """
        from rayrec.recommend.reranking import network_of

        if horizon not in ("short", "long"):
            raise InputError(f"horizon is {horizon!r}; expected short or long")
        _, dataset, recommender = self._load_live_release()
        at_ms, user_ids = _to_ms(at), _list_ids(users)
        histories = self._histories(dataset, user_ids, at_ms)
        if not histories.lengths.all():
            user = user_ids[int(np.argmin(histories.lengths))]
            raise NotFoundError(
                f"user {user!r} has no known plays before {format_iso(at_ms)}; check the ID and the moment"
            )
        vectors = network_of(recommender).vectors(histories, Queries.at_end(histories, at_ms), horizon)
        return pd.DataFrame(vectors, index=pd.Index(user_ids, name="user_id"))

    def save(self, path: str | Path) -> Path | str:
        """Copy everything to a folder or an s3:// or gs:// prefix, which `rayrec.load` and `rayrec serve` can open.

        Raises `InputError` if the target is not empty, and `NotFoundError` before a fit.
        """
        self._require_release()
        target = Workspace(path)
        if target.exists("") and target.files(""):
            raise InputError(f"{path} is not empty; save to another folder")
        with exclusive(self.workspace, "save"):
            pafs.copy_files(
                self.workspace.root,
                target.root,
                source_filesystem=self.workspace.filesystem,
                destination_filesystem=target.filesystem,
            )
        for name in (LOCK, LOCK_HOLDER):  # the lock of this copy was copied too
            target.delete(name)
        return path

    def __getstate__(self) -> dict[str, Any]:
        if self._folder is not None:
            raise TypeError("a Recommender in a temporary folder cannot be pickled or copied; use save and rayrec.load")
        return {**self.__dict__, "_loaded": None}

    def __repr__(self) -> str:
        release_id = read_active(self.workspace)["active"]
        return f"Recommender({'not fitted' if release_id is None else f'release {release_id}'})"

    def _repr_html_(self) -> str:
        release = active_release(self.workspace)
        if release is None:
            return html_values_table("Recommender", {"state": "not fitted"})
        manifest = Dataset(self.workspace).manifest
        values = {"plays": manifest.plays, "users": manifest.users, "songs": manifest.songs, "release": release.id}
        quality = "" if self.quality is None else self.quality._repr_html_()
        return html_values_table("Recommender", values) + quality

    def _require_release(self) -> Manifest:
        """Return the live release. Raises `NotFoundError` before a fit."""
        release = active_release(self.workspace)
        if release is None:
            raise NotFoundError("this Recommender is not fitted; call fit first")
        return release

    def _load_live_release(self) -> tuple[Manifest, Dataset, BaseRecommender]:
        """Return the live release, its data set and its recommender, which are loaded once.

        Raises `NotFoundError` before a fit, and after a fit on other plays that did not end.
        """
        from rayrec.recommend.answer import load_recommender

        release, dataset = self._require_release(), Dataset(self.workspace)
        if not dataset.descends_from(release.inputs["dataset"]):
            raise NotFoundError("the last fit, on other plays, did not finish; call fit again")
        if self._loaded is None or (self._loaded[0], self._loaded[1].manifest.id) != (release, dataset.manifest.id):
            self._loaded = release, dataset, load_recommender(self.workspace, dataset, release.inputs)
        return self._loaded

    @staticmethod
    def _histories(dataset: Dataset, users: Sequence[str], at: int) -> Histories:
        """Return the plays of users before a moment, ms UTC, in the order of the users."""
        from rayrec.recommend.answer import histories_of_users

        if not users:
            raise InputError("no users were given; give at least one user ID")
        return histories_of_users(dataset, users, at)

    @staticmethod
    def _song_table(dataset: Dataset, rows: np.ndarray) -> pd.DataFrame:
        """Return a table with song_id, title and artist of song rows."""
        table = dataset.catalog().table.select([names.SONG_ID, names.TITLE, names.ARTIST])
        song_table = table.take(pa.array(np.asarray(rows, dtype=np.int64))).rename_columns(
            ["song_id", "title", "artist"]
        )
        return song_table.to_pandas()

    def _replaces_dataset(self, config: FitConfig) -> bool:
        """Return True if a fit replaces the data set: after a completed fit, or one on other plays that did not end.

        A fit on the same plays that did not end is continued. The live release need not be usable: a fit replaces it.
        """
        if read_active(self.workspace)["active"] is not None:
            return True
        if not self.workspace.exists(DATASET_MANIFEST):
            return False
        manifest = Dataset(self.workspace).manifest
        imported_plays: Any = manifest.config.get("plays")
        # A fit that did not end has appended nothing, so the user imported appended plays; they must not be replaced.
        return not manifest.appended and (
            not isinstance(imported_plays, dict) or tuple(imported_plays["paths"]) != config.paths
        )

    def _require_reachable(self) -> None:
        """Raise `InputError` if the workspace is a temporary folder, which workers on other nodes cannot read."""
        from rayrec.jobs.runtime import require_one_node

        if self._folder is not None:
            require_one_node()

    def _progress_callbacks(self) -> dict[str, Any]:
        return {"on_stage": _print_stage, "on_note": lambda text: _print(_python_text(text))} if self.progress else {}


def load(path: str | Path, *, progress: bool = True) -> Recommender:
    """Load the recommender that `Recommender.save` wrote, or that of any workspace with a live release.

    Raises `NotFoundError` if there is no live release.
    """
    model = Recommender(workspace=path, progress=progress)
    if active_release(model.workspace) is None:
        raise NotFoundError(f"{path} has no live release; save a fitted Recommender there, or run `rayrec fit`")
    return model


class _SentPlays:
    """Gives plays to a stage in a with block, as settings with their path. The caller must hold the workspace's lock.

    A table is written into the workspace, and deleted when the block ends. Errors of bad input in the block name "the
    table" instead of this file, and arguments instead of options of the command line.
    """

    def __init__(self, workspace: Workspace, plays: Plays) -> None:
        self._workspace, self._plays, self._file = workspace, plays, ""

    def __enter__(self) -> dict[str, Any]:
        self._workspace.delete(SENT_PLAYS)  # files of a killed run; no other run writes at this time
        if isinstance(self._plays, str | Path):
            return {"paths": (str(self._plays),)}
        table = _arrow_table(self._plays)
        digest = hashlib.sha256()
        for batch in table.to_batches():
            digest.update(batch.serialize())
        self._file = f"{SENT_PLAYS}/plays-{digest.hexdigest()[:12]}.parquet"
        try:
            self._workspace.write_table(self._file, table)
        except pa.ArrowException as error:
            raise _unreadable_error(error) from error
        # The format is given, since it cannot be guessed from a URI that ends with options.
        return {"paths": (self._workspace.uri_of(self._file),), "format": "parquet"}

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, InputError) and len(error.args) == 1:
            text = str(error)
            if self._file:
                text = text.replace(self._workspace.uri_of(self._file), "the table")
            error.args = (_python_text(text),)
        if self._file:
            self._workspace.delete(self._file)


def _column_names(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Return role -> name of the column in a stored table, in which a number as name became text."""
    return {role: str(name) for role, name in (columns or {}).items()}


def _python_text(text: str) -> str:
    """Return a text for the command line with its options as arguments: columns={"user": "NAME"} for --columns."""

    def argument(match: re.Match[str]) -> str:
        try:
            mapping = "".join(shlex.split(match[1]))
        except ValueError:  # a quote without its end
            return match[0]
        columns = dict(re.findall(r"(\w+)=(.*?)(?=,\w+=|$)", mapping))
        return f"columns={json.dumps(columns, ensure_ascii=False)}" if columns else match[0]

    shell_word = r"""(?:'[^']*'|"[^"]*"|\S)+(?<![,.;])"""
    text = re.sub(f"--columns ({shell_word})", argument, text).replace("--user NAME", 'user="NAME"')
    return re.sub(r"--(user|columns|timezone)(?![\w-])", r"\1=", text)


def _arrow_table(plays: Any) -> pa.Table:
    """Convert plays to an Arrow table. Raises `InputError` for other objects, and for unreadable column types."""
    try:
        if isinstance(plays, pd.DataFrame):
            return _decode_dictionaries(pa.Table.from_pandas(_plain_frame(plays), preserve_index=False))
        if isinstance(plays, pa.Table):
            return _decode_dictionaries(plays)
        if hasattr(plays, "__arrow_c_stream__"):
            return _decode_dictionaries(pa.table(plays))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise _unreadable_error(error) from error
    raise InputError(
        f"plays are a {type(plays).__name__}; expected a pandas or polars DataFrame, an Arrow table or a path"
    )


def _unreadable_error(error: Exception) -> InputError:
    return InputError(
        f"the plays cannot be read: {first_line(error)}; drop the column, or convert it to text with astype(str)"
    )


def _plain_frame(plays: pd.DataFrame) -> pd.DataFrame:
    """Return plays with a named index as columns, and with periods replaced by the moments at which they begin."""
    level_names = [name for name in plays.index.names if name is not None and name not in plays.columns]
    if level_names:
        plays = plays.reset_index(level_names)
    periods = {
        name: plays[name].dt.to_timestamp() for name in plays.columns if isinstance(plays.dtypes[name], pd.PeriodDtype)
    }
    return plays.assign(**periods) if periods else plays


def _decode_dictionaries(table: pa.Table) -> pa.Table:
    """Return a table in which dictionary-encoded columns are replaced by their values."""
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            # Polars stores categories as string views, which Arrow cannot decode.
            is_string_view = pa.types.is_string_view(field.type.value_type)
            value_type = pa.large_string() if is_string_view else field.type.value_type
            chunks = [
                pa.DictionaryArray.from_arrays(chunk.indices, chunk.dictionary.cast(value_type)).dictionary_decode()
                for chunk in table.column(index).chunks
            ]
            table = table.set_column(index, field.name, pa.chunked_array(chunks, value_type))
    return table


def _list_ids(users: Users) -> list[Any]:
    """Return the ids of one or more users as a list. Raises `InputError` for a value that is not an id."""
    if isinstance(users, (pd.DataFrame, Mapping)):
        raise InputError(f"users are a {type(users).__name__}; expected an ID, or a list or column of IDs")
    if isinstance(users, (str, bytes, UUID, int, float, np.generic)):
        users = [users]
    ids: list[Any] = users.to_pylist() if isinstance(users, (pa.Array, pa.ChunkedArray)) else list(users)
    for index, user in enumerate(ids):
        if spell_id(user) is None:
            raise InputError(f"users[{index}] is {user!r}; expected an ID (text or a number)")
    return ids


def _to_ms(at: Moment | None) -> int:
    """Return a moment in ms UTC, by default now; a pandas timestamp or datetime without a zone is UTC."""
    if at is None:
        return now_ms()
    if isinstance(at, np.integer | np.floating):  # such as the maximum of a column
        at = at.item()
    if isinstance(at, str | int | float):
        return parse_timestamp(at)
    timestamp = pd.Timestamp(at)
    if pd.isna(timestamp):
        raise InputError(f"at is {at!r}; expected a moment, such as 2026-01-20T18:30:00Z")
    return int((timestamp if timestamp.tz is not None else timestamp.tz_localize("UTC")).timestamp() * 1000)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_stage(outcome: Outcome) -> None:
    training_note = f", trained on {outcome.trained_on}" if outcome.trained_on else ""
    _print(f"{outcome.stage}: {outcome.status}{training_note}{f' ({outcome.reason})' if outcome.reason else ''}")
