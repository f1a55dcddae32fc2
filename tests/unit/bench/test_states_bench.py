"""The benchmark of loading states: all users are loaded into each kind of store."""

from stores import needs_redis

from rayrec.bench.bench_config import StatesBenchConfig
from rayrec.bench.states_bench import bench_states
from rayrec.storage.workspace import Workspace


@needs_redis
def test_all_users_are_loaded_into_both_stores(workspace: Workspace) -> None:
    metrics = bench_states(workspace, StatesBenchConfig.quick().replace(users=300))
    assert metrics["users"] == 300
    for store in ("sqlite", "redis"):
        assert metrics[f"{store}_users_per_second"] > 0
        assert metrics[f"{store}_cpu_seconds"] > 0
        assert 500 < metrics[f"{store}_user_bytes"] < 10_000
    assert metrics["sqlite_server_cpu_seconds"] == 0.0
