"""`serve_compat` fits the installed Serve. If a test fails, read what changed in Serve and adapt the module."""

import inspect
import subprocess
from pathlib import Path

import pytest
from ray import serve
from ray.serve._private import replica

from rayrec.errors import RayrecError
from rayrec.serving import serve_compat


def test_the_installed_ray_is_the_one_whose_private_parts_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_compat.require_known_ray()
    monkeypatch.setattr(serve_compat, "version", lambda name: "2.61.0")
    with pytest.raises(RayrecError, match=r"serving requires Ray 2.60, found 2.61.0"):
        serve_compat.require_known_ray()


def test_serves_template_of_haproxy_is_the_known_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve_compat.templates_digest() == serve_compat.TEMPLATES, (
        "Serve writes HAProxy's configuration differently now"
    )
    serve_compat.write_haproxy_wrapper(tmp_path)
    monkeypatch.setattr(serve_compat, "TEMPLATES", "0" * len(serve_compat.TEMPLATES))
    with pytest.raises(RayrecError, match="template of HAProxy's configuration is unknown"):
        serve_compat.write_haproxy_wrapper(tmp_path)


def test_only_haproxys_own_pages_are_held_to_loopback(tmp_path: Path) -> None:
    """The application's own port stays on the address in the configuration."""
    config = tmp_path / "haproxy.cfg"
    config.write_text("frontend a\n    bind :7001\nfrontend b\n    bind *:8000\nlisten c\n  bind *:7002\n")
    wrapper = serve_compat.write_haproxy_wrapper(tmp_path, (7001, 7002))
    subprocess.run([wrapper, "-v", "-f", config], check=True, capture_output=True)
    bind_lines = [line.strip() for line in config.read_text().splitlines() if "bind" in line]
    assert bind_lines == ["bind 127.0.0.1:7001", "bind *:8000", "bind 127.0.0.1:7002"]


def test_a_replica_still_binds_its_port_where_it_is_held_to_loopback() -> None:
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica)


def test_serve_still_asks_a_class_without_an_app_for_the_method_that_ours_has() -> None:
    with pytest.raises(ValueError, match="__serve_build_asgi_app__"):
        serve.ingress()(type("Empty", (), {}))
