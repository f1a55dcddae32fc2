"""What an evaluation says of the parts that it compares."""

import pytest

from rayrec.jobs.evaluate import ComparedModels
from rayrec.storage.artifacts import Manifest


def _compared(*, split: bool = True, **sources: str) -> ComparedModels:
    """The network `model`, another one `r_pst` and the song embeddings, each made of so-and-so."""
    made = {
        name: Manifest(kind="models", id=name, metrics={"source": sources.get(name, "histories")})
        for name in ("model", "r_pst", "songs")
    }
    return ComparedModels(
        names=("taste", "r_pst"),
        default="taste",
        model=made["model"],
        others={"r_pst": made["r_pst"]},
        songs=made["songs"],
        inputs={"split": "s"} if split else {},
    )


@pytest.mark.parametrize(
    ("part", "named"), [("model", "the network"), ("r_pst", "r_pst"), ("songs", "the song embeddings")]
)
def test_parts_made_of_playlists_are_named_where_a_split_evaluates_them(part: str, named: str) -> None:
    warning = _compared(**{part: "playlists"}).warning  # type: ignore[arg-type]
    assert warning is not None
    assert warning.startswith(f"{named}: made of playlists, which carry no times")
    assert _compared(split=False, **{part: "playlists"}).warning is None


def test_there_is_nothing_to_warn_of_where_the_split_cut_everything() -> None:
    assert _compared().warning is None
    assert _compared(model="sessions").warning is None
