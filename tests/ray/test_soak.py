"""The soak on a Redis Cluster: replicas and primaries are killed under load, and every play is counted once."""

import pytest
from stores import needs_redis_cli

from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.soak import soak


@needs_redis_cli
@pytest.mark.slow
def test_no_acknowledged_play_is_lost_where_a_primary_of_the_cluster_is_killed() -> None:
    config = BenchConfig.quick().replace(soak_minutes=0.75, soak_kill_seconds=15.0, soak_store="redis-cluster")
    figures = soak(None, config)
    assert figures["failovers"] >= 2
    assert figures["killed"] >= 1
    assert figures["acknowledged_plays"] > 50
    assert (figures["lost_plays"], figures["plays_counted_twice"]) == (0, 0)
    assert figures["failure_share"] < 0.01
