"""The song side: every kind of table at every size, the largest against the smallest."""

from rayrec.bench.bench_config import SongsBenchConfig
from rayrec.bench.index_bench import bench_song_side


def test_every_table_is_timed_at_every_size() -> None:
    told = bench_song_side(SongsBenchConfig(rounds=1, songs=(300, 200), steps=1)).to_json()
    assert (told["name"], told["unit"]) == ("songs", "plays")
    for table in ("trained", "mapped", "frozen"):
        for songs in (200, 300):
            assert told[f"{table}_{songs}_per_second"] > 0
