"""Store what a file tells of the songs of a data set."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from rayrec.config import Settings, to_mapping
from rayrec.data import columns
from rayrec.data.catalog import DESCRIPTIONS, DESCRIPTIONS_FILE
from rayrec.data.columns import one_array
from rayrec.data.dataset import Dataset
from rayrec.importing.descriptions import ROLES, read_descriptions
from rayrec.importing.readers.delimited import Delimiter
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace


class DescribeConfig(Settings):
    """Which columns of the file hold which metadata."""

    columns: dict[str, str] = Field(
        {},
        description=f"Column of each role, as role=column; roles: {', '.join(ROLES)}; default: same name",
    )
    delimiter: Delimiter = Field(",", description="csv: column delimiter; \\t for a tab")


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a file told."""

    songs: int  # of the catalog
    described: int  # songs that the file tells of
    unknown: int  # songs of the file that are not in the catalog; left out until they are imported
    titles: int  # songs of the catalog with a title now
    artists: int
    albums: int
    released: int  # songs with a release day
    markets: int  # songs with a list of markets


@writes("describe")
def describe(workspace: Workspace, config: DescribeConfig, path: str) -> Described:
    """Read a table of songs and keep it beside the data set, in place of the one that was there.

    Raises `NotFoundError` without a data set, and `InputError` as `read_descriptions` does.
    """
    dataset = Dataset(workspace)
    told = read_descriptions(path, config.columns, config.delimiter)
    store_descriptions(dataset, told, {**to_mapping(config), "path": path})
    table = dataset.catalog().table
    known = pc.is_in(told.column(columns.SONG_ID), value_set=one_array(table.column(columns.SONG_ID)))
    described = pc.sum(known).as_py() or 0

    def given(name: str) -> int:
        return len(table) - int(table.column(name).null_count)

    return Described(
        songs=len(table),
        described=described,
        unknown=len(told) - described,
        titles=given(columns.TITLE),
        artists=given(columns.ARTIST),
        albums=given(columns.ALBUM),
        released=given(columns.RELEASED),
        markets=given(columns.MARKETS),
    )


def store_descriptions(dataset: Dataset, told: pa.Table, config: dict[str, Any]) -> Manifest:
    """Make `told`, columns.DESCRIPTIONS, what the data set's songs are described by; what was told before goes."""
    workspace, inputs = dataset.workspace, {"dataset": dataset.manifest.id}
    before = artifacts.listing(workspace, DESCRIPTIONS)
    print_id = artifacts.fingerprint("describe", config, inputs)
    made_id, _ = artifacts.new_id(workspace, DESCRIPTIONS, print_id, repeat=True)
    manifest = Manifest(kind=DESCRIPTIONS, id=made_id, config=config, inputs=inputs)
    workspace.write_table(manifest.path(DESCRIPTIONS_FILE), told)
    made = artifacts.publish(workspace, manifest, [DESCRIPTIONS_FILE])
    for each in before:
        workspace.delete(each.path("manifest.json"))  # first: without it the rest is nothing
        workspace.delete(each.folder)
    return made
