"""What tests that want a real Redis skip for where there is none."""

import pytest

from rayrec.bench.redis_servers import CLI, SERVER

needs_redis = pytest.mark.skipif(SERVER is None, reason="redis-server is not installed")
needs_redis_cli = pytest.mark.skipif(SERVER is None or CLI is None, reason="redis-cli is not installed")
