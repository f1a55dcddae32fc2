"""API keys: how they are read and compared, and which requests need one."""

import hmac
import logging
from pathlib import Path
from typing import Any

import pytest
from served import Client, service

from rayrec.errors import InputError
from rayrec.serving.middleware import KEYS_VARIABLE, Keys, load_keys
from rayrec.serving.serve_config import ServeConfig
from rayrec.storage.workspace import Workspace

READ, WRITE, ADMIN = "reader-0123456789", "writer-0123456789", "admin-0123456789a"
ALL_KEYS = f"read:{READ}, write:{WRITE},admin:{ADMIN}"


@pytest.fixture
def keys() -> Keys:
    return load_keys(ServeConfig(host="0.0.0.0"), {KEYS_VARIABLE: ALL_KEYS})


def test_keys_come_from_the_environment_and_a_file_with_their_roles(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# of the mobile team\n\nread:{READ}\n")
    keys = load_keys(ServeConfig(keys_file=str(path)), {KEYS_VARIABLE: f"admin:{ADMIN}"})
    assert keys.roles(f"Bearer {READ}") == {"read"}
    assert keys.roles(f"bearer {ADMIN}") == {"read", "write", "admin"}
    assert keys.required


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", f"Basic {READ}", f"Bearer {READ}x", READ, "Bearer ñ"]
)
def test_a_wrong_or_missing_key_may_do_nothing(keys: Keys, header: str | None) -> None:
    assert keys.roles(header) == set()


def test_every_key_is_compared_in_constant_time_whichever_fits(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    compared_pairs = []
    compare_digest = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: compared_pairs.append(pair) or compare_digest(*pair))
    for header in (f"Bearer {READ}", f"Bearer {ADMIN}", "Bearer nothing"):
        compared_pairs.clear()
        keys.roles(header)
        assert len(compared_pairs) == 3


def test_keys_themselves_are_neither_kept_nor_shown(keys: Keys) -> None:
    assert READ not in repr(keys) + repr(vars(keys))


def test_without_keys_only_loopback_may_be_served() -> None:
    assert not load_keys(ServeConfig(host="127.0.0.1"), {}).required
    assert not load_keys(ServeConfig(host="::1"), {}).required
    for host in ("0.0.0.0", "::", "10.0.0.5", "example.org"):
        with pytest.raises(InputError, match=KEYS_VARIABLE):
            load_keys(ServeConfig(host=host), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("read", "role:key"),
        (f"reader:{READ}", "read, write, admin"),
        ("read:short", "5 characters"),
        ("read:a b", "role"),
        (f"read+reader:{READ}", "roles are read, write, admin"),
        ("read:schlüssel-0123456789", "ASCII"),
        ("read:reader-\x7f-0123456789", "ASCII"),
    ],
)
def test_what_does_not_read_as_a_key_is_refused_without_showing_it(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load_keys(ServeConfig(), {KEYS_VARIABLE: text})
    assert text.partition(":")[2] not in str(raised.value) or ":" not in text


def test_a_keys_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keys file"):
        load_keys(ServeConfig(keys_file=str(tmp_path / "none")), {})


@pytest.mark.parametrize("text", ["", "\n# read:reader-0123456789\n"])
def test_a_keys_file_without_keys_is_refused_even_on_loopback(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InputError, match=r"keys file .* has no keys.*one per line"):
        load_keys(ServeConfig(host="127.0.0.1", keys_file=str(path)), {})


def test_a_line_of_a_keys_file_with_several_entries_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"admin:{ADMIN}\nread:{READ},write:{WRITE}\n")
    with pytest.raises(InputError, match=r"entry 2 has a comma.*one role:key per line") as raised:
        load_keys(ServeConfig(keys_file=str(path)), {})
    assert READ not in str(raised.value)


def test_one_key_may_hold_several_roles() -> None:
    keys = load_keys(ServeConfig(), {KEYS_VARIABLE: f"read+write:{READ}"})
    assert keys.roles(f"Bearer {READ}") == {"read", "write"}


def test_nothing_is_answered_without_a_key_and_each_role_has_its_own(world: Workspace, keys: Keys, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    with service(world, keys=keys) as replica:
        assert Client(replica).get("/").headers["content-type"].startswith("text/html")  # the page, without any data
        paths = [
            "/metrics",
            "/v1/release",
            "/v1/nothing",
            "/-/healthz",
        ]
        for client in (Client(replica), Client(replica, key="wrong-0123456789")):
            for method, path in [("GET", path) for path in paths] + [
                ("POST", "/v1/recommendations"),
                ("POST", "/v1/plays"),
                ("DELETE", "/v1/users/ann"),
                ("POST", "/healthz"),
            ]:
                response = client.request(method, path)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["content-type"] == "application/problem+json"
        reader, writer, admin = (Client(replica, key=key) for key in (READ, WRITE, ADMIN))
        assert reader.post("/v1/recommendations", {"history": []}).status_code == 200
        assert writer.post("/v1/recommendations", {"history": []}).status_code == 403
        assert [client.get("/metrics").status_code for client in (reader, writer, admin)] == [403, 403, 200]
        assert reader.post("/v1/plays", {}).status_code == 403
        assert [client.request("DELETE", "/v1/users/ann").status_code for client in (reader, writer, admin)] == [
            403,
            403,
            204,
        ]
        assert Client(replica).get("/healthz").status_code == Client(replica).get("/readyz").status_code == 200
        assert writer.post("/v1/plays", {}).status_code == 422
        response_text = admin.get("/metrics").text + admin.get("/v1/release").text
    for key in (READ, WRITE, ADMIN, "wrong-0123456789"):
        assert key not in caplog.text + response_text


@pytest.mark.parametrize(("route_prefix", "path_end"), [("", "%0A"), ("/music", ""), ("/music", "%0A")])
def test_no_spelling_of_a_path_that_the_router_accepts_gives_a_key_other_roles(
    world: Workspace, keys: Keys, route_prefix: str, path_end: str
) -> None:
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/plays", {"json": {"plays": []}}),
        ("POST", "/v1/songs", {"json": {"songs": [{"song_id": "new"}]}}),
        ("GET", "/metrics", {}),
    ]
    with service(world, keys=keys) as replica:
        reader = Client(replica, key=READ, route_prefix=route_prefix)
        for method, path, options in requests:
            assert reader.request(method, f"{route_prefix}{path}{path_end}", **options).status_code == 403, path
        admin = Client(replica, key=ADMIN, route_prefix=route_prefix)
        assert admin.get(f"{route_prefix}/metrics{path_end}").status_code == 200


def test_open_paths_need_no_key_under_a_route_prefix(world: Workspace, keys: Keys) -> None:
    with service(world, keys=keys) as replica:
        client = Client(replica, route_prefix="/music")
        assert [client.get(f"/music{path}").status_code for path in ("/healthz", "/docs", "/v1/release")] == [
            200,
            200,
            401,
        ]


def test_the_document_of_the_api_needs_no_key_and_says_how_to_send_one(world: Workspace, keys: Keys) -> None:
    with service(world, keys=keys) as replica:
        client = Client(replica)
        get, head = client.get("/openapi.json"), client.request("HEAD", "/openapi.json")
        assert client.post("/openapi.json").status_code == 401
    assert (get.status_code, head.status_code, head.content) == (200, 200, b"")
    assert get.json()["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}


def test_health_and_metrics_are_open_or_closed_by_their_own_settings(world: Workspace, keys: Keys) -> None:
    for settings, statuses in (
        ({}, [200, 401]),
        ({"open_health": False}, [401, 401]),
        ({"open_metrics": True}, [200, 200]),
    ):
        with service(world, keys=keys, **settings) as replica:
            assert [Client(replica).get(path).status_code for path in ("/readyz", "/metrics")] == statuses


def test_without_keys_other_machines_are_not_answered(world: Workspace) -> None:
    with service(world) as replica:
        assert Client(replica, address="10.0.0.7").get("/healthz").status_code == 403
        assert Client(replica, address="127.0.0.1").get("/healthz").status_code == 200
        assert Client(replica, address="::1").get("/healthz").status_code == 200


def test_without_keys_a_web_page_whose_name_resolves_to_this_machine_is_not_answered(
    world: Workspace, keys: Keys
) -> None:
    hosts = {
        "localhost": 200,
        "LOCALHOST:8000": 200,
        "127.0.0.1:8000": 200,
        "127.1.2.3": 200,
        "[::1]:8000": 200,
        "music.example": 403,
        "127.0.0.1.music.example:8000": 403,
        "localhost.music.example": 403,
        "10.0.0.7": 403,
        "[::1": 403,
        "": 403,
    }
    with service(world) as replica:
        client = Client(replica)
        assert {host: client.get("/v1/release", headers={"Host": host}).status_code for host in hosts} == hosts
        assert client.request("DELETE", "/v1/users/ann", headers={"Host": "music.example"}).status_code == 403
    with service(world, keys=keys) as replica:
        client = Client(replica, key=READ)
        assert client.get("/v1/release", headers={"Host": "music.example"}).status_code == 200
