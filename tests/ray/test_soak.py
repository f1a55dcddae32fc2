"""The soak on a Redis Cluster: replicas and primaries are killed under load, and every play is counted once."""

import pytest
from stores import needs_redis_cli

from rayrec.bench.bench_config import SoakBenchConfig
from rayrec.bench.soak import soak
from rayrec.storage.workspace import Workspace


@needs_redis_cli
@pytest.mark.slow
def test_no_acknowledged_play_is_lost_where_a_primary_of_the_cluster_is_killed(workspace: Workspace) -> None:
    config = SoakBenchConfig.quick().replace(minutes=0.75, kill_seconds=15.0, store="redis-cluster")
    metrics = soak(workspace, config)
    assert metrics["failovers"] >= 2
    assert metrics["killed"] >= 1
    assert metrics["acknowledged_plays"] > 50
    assert (metrics["lost_plays"], metrics["plays_counted_twice"]) == (0, 0)
    assert metrics["failure_share"] < 0.01
