"""Readers of outside formats. Each turns units of files into batches of plays or playlist entries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rayrec.importing.readers import apple_music
from rayrec.importing.readers.accounts import check_accounts
from rayrec.importing.readers.deezer import DeezerReader, check_deezer_accounts
from rayrec.importing.readers.lastfm_1k import LastfmReader
from rayrec.importing.readers.listenbrainz import NOT_A_LISTEN_FILE, ListenBrainzReader, check_listeners
from rayrec.importing.readers.mpd import MpdReader
from rayrec.importing.readers.music4all_onion import Music4AllOnionReader
from rayrec.importing.readers.reader import NO_SONG, Reader, ReadOptions
from rayrec.importing.readers.sequences import SequenceReader
from rayrec.importing.readers.spotify_history import ACCOUNT_DATA, PODCAST, SpotifyHistoryReader, check_usernames
from rayrec.importing.readers.tabular import OTHER_EVENT, CsvReader, ParquetReader
from rayrec.importing.readers.tidal import NOT_A_TRACK, TidalReader
from rayrec.importing.readers.yambda import YambdaReader
from rayrec.importing.readers.youtube_takeout import NOT_MUSIC, SEARCH, YoutubeTakeoutReader, check_watchers
from rayrec.storage.artifacts import Times


@dataclass(frozen=True, kw_only=True)
class Format:
    """An outside format that can be imported."""

    make: Callable[[ReadOptions], Reader]
    patterns: tuple[str, ...]  # patterns of the lower-case names of its files in a folder, without .gz or .bz2
    mapped: bool = False  # columns are mapped to roles, and rows may be plays or playlist entries
    playlists: bool = False  # holds playlists, not plays
    names_users: bool = False  # every record has a user, so none can be given
    ends_with_line: bool = False  # each line has a line end: without the last one, the file may have been cut
    check_users: Callable[[Sequence[str], str], list[str]] | None = None  # see accounts.check_accounts
    not_plays: tuple[str, ...] = ()  # reject reasons of rows that are no plays (podcasts): `max_rejected` ignores them
    times: Times = "real"  # positions: plays have no times, only their place in a line, and lines are in order


FORMATS: dict[str, Format] = {
    "apple-music": Format(
        make=apple_music.AppleMusicReader,
        patterns=("apple music*play activity*.csv",),
        not_plays=(apple_music.OTHER_EVENT, apple_music.NOT_A_SONG, NO_SONG),
        ends_with_line=True,
        check_users=check_accounts,
    ),
    "csv": Format(
        make=CsvReader, patterns=("*.csv", "*.tsv"), mapped=True, not_plays=(OTHER_EVENT,), ends_with_line=True
    ),
    "deezer": Format(make=DeezerReader, patterns=("deezer-data*.xlsx",), check_users=check_deezer_accounts),
    "lastfm-1k": Format(make=LastfmReader, patterns=("userid-timestamp*.tsv",), names_users=True, ends_with_line=True),
    "listenbrainz": Format(
        make=ListenBrainzReader,
        patterns=("*.listens", "*.jsonl", "*.ndjson", "*.json"),
        not_plays=(NOT_A_LISTEN_FILE,),
        check_users=check_listeners,
    ),
    "mpd": Format(make=MpdReader, patterns=("*.json",), playlists=True),
    "music4all-onion": Format(
        make=Music4AllOnionReader,
        patterns=("userid_trackid_timestamp*.tsv",),
        names_users=True,
        ends_with_line=True,
    ),
    "parquet": Format(make=ParquetReader, patterns=("*.parquet",), mapped=True, not_plays=(OTHER_EVENT,)),
    "sequences": Format(
        make=SequenceReader, patterns=("*.txt", "*.lst", "*.seq"), ends_with_line=True, times="positions"
    ),
    "spotify-history": Format(
        make=SpotifyHistoryReader,
        patterns=("streaming_history_*.json", "endsong*.json", "streaminghistory*.json"),
        not_plays=(PODCAST, ACCOUNT_DATA),
        check_users=check_usernames,
    ),
    "tidal": Format(
        make=TidalReader,
        patterns=("streaming*.csv",),
        not_plays=(NOT_A_TRACK,),
        ends_with_line=True,
        check_users=check_accounts,
    ),
    "yambda": Format(make=YambdaReader, patterns=("listens.parquet",), names_users=True),
    "youtube-takeout": Format(
        make=YoutubeTakeoutReader, patterns=("*.json",), not_plays=(NOT_MUSIC, SEARCH), check_users=check_watchers
    ),
}
