"""Settings of `rayrec fit` and `rayrec update`. Loads nothing heavy."""

from typing import Annotated

from pydantic import AfterValidator, Field

from rayrec.config import Settings
from rayrec.data.moments import known_zone

TRAIN_SHARE = 0.1


class PlaysConfig(Settings):
    """Files of plays; what is not given is guessed."""

    paths: tuple[str, ...] = Field(min_length=1, description="Files or folders, .gz too, local, s3:// or gs://")
    format: str | None = Field(None, description="Format of the files; default: guessed")
    columns: dict[str, str] = Field(
        {}, description="Column of each role, such as user=user_id,song=song_id,played_at=ts; others are guessed"
    )
    timezone: Annotated[str | None, AfterValidator(known_zone)] = Field(
        None,
        description="Time zone of times without one, such as Europe/Berlin; default: UTC, in an update that of the fit",
    )


class FitConfig(PlaysConfig):
    """What to fit."""

    epochs: int | None = Field(
        None, ge=1, description="Maximum epochs of the network; default: those of `rayrec train`"
    )


class UpdateConfig(PlaysConfig):
    """What to bring up to date, and when to train."""

    train: bool = Field(False, description="Continue the training of the model, however few plays are new")
    train_share: float = Field(
        TRAIN_SHARE, ge=0, le=1, description="Share of plays newer than the model above which it is trained again"
    )
    store: str | None = Field(
        None,
        description="Store of user states to load, sqlite:///PATH or redis://HOST:PORT/0; default: the workspace's own "
        "if there is one",
    )
