"""What tests that want a real Redis skip for where there is none."""

import pytest

from rayrec.bench.redis_servers import CLI, SERVER

needs_redis = pytest.mark.skipif(SERVER is None, reason="no redis-server: install Debian's package redis-server")
needs_redis_cli = pytest.mark.skipif(
    SERVER is None or CLI is None, reason="no redis-cli: install Debian's package redis-tools"
)
