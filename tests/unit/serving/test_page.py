"""The page in a real browser, against the application on uvicorn."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from served import AT, service, write_release, write_world

from rayrec.data import columns
from rayrec.serving.middleware import Keys, load_keys
from rayrec.serving.routes import create_app
from rayrec.serving.serve_config import ServeConfig
from rayrec.storage.workspace import SONGS_TABLE, Workspace

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
KEY = "r" * 20
EVIL = "<img src=x onerror=\"document.title='broken'\"> Title 9"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One song has a title that is markup."""
    workspace = Workspace(tmp_path_factory.mktemp("page") / "workspace")
    write_world(workspace)
    songs = workspace.read_table(SONGS_TABLE)
    titles = songs.column(columns.TITLE).to_pylist()
    titles[9] = EVIL
    workspace.write_table(SONGS_TABLE, songs.set_column(2, songs.schema.field(columns.TITLE), [titles]))
    write_release(workspace)
    return workspace


@contextmanager
def served(world: Workspace, keys: Keys | None = None) -> Iterator[str]:
    with service(world, keys) as opened:
        server = uvicorn.Server(uvicorn.Config(create_app(opened), host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not there: install Debian's chromium to test the page")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@contextmanager
def page_of(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page; every request to elsewhere, every error in the console and every thrown one is a failure."""
    context = browser.new_context(**options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("request", lambda request: None if request.url.startswith((url, "data:")) else wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.set_default_timeout(30_000)
    page.goto(url)
    yield page
    context.close()
    assert not wrong


def find_and_play(page: Any, words: str, name: str) -> None:
    page.get_by_label("Find a song").fill(words)
    page.get_by_label("Songs found").get_by_role("button", name=name, exact=True).click()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_songs_are_found_played_and_answered_on_both_time_scales(
    world: Workspace, browser: Any, width: int, scheme: str
) -> None:
    size = {"width": width, "height": 900}
    with served(world) as url, page_of(browser, url, viewport=size, color_scheme=scheme) as page:
        find_and_play(page, "title 3", "Play Artist 3 – Title 3")
        find_and_play(page, "title 50", "Play Artist 1 – Title 50")
        page.locator("#status", has_text="2 plays").wait_for()
        body = {"history": ["song-3", "song-50"], "k": 10, "explain": True}
        for horizon in ("short", "long"):
            answer = httpx.post(f"{url}/v1/recommendations", json={**body, "horizon": horizon}).json()
            shown = [item.get_attribute("data-song") for item in page.locator(f"#{horizon} li").all()]
            assert shown == [song["song_id"] for song in answer["songs"]]
        page.locator("#map g").first.wait_for()
        drawn = {spot.get_attribute("data-song") for spot in page.locator("#map g").all()}
        assert {"song-3", "song-50"} < drawn
        shown_reasons = [item.inner_text() for item in page.locator("#long .why").all()]
        assert shown_reasons == ["; ".join(song["reasons"]) for song in answer["songs"]]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Remove Artist 3 – Title 3").click()
        page.locator("#status", has_text="1 play").wait_for()


def test_titles_are_text_whatever_they_hold(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        find_and_play(page, "onerror", f"Play Artist 2 – {EVIL}")
        page.locator("#status", has_text="1 play").wait_for()
        assert page.locator("#history .name").inner_text().startswith("<img")
        assert page.locator("img").count() == 0
        assert page.title() == "rayrec"


def test_a_stored_listener_is_shown(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        plays = [
            {"user_id": "ann", "song_id": f"song-{song}", "played_at": AT + song, "event_id": str(song)}
            for song in (3, 50)
        ]
        assert httpx.post(f"{url}/v1/plays", json={"plays": plays}).status_code == 200
        page.get_by_label("Id of a stored user").fill("ann")
        page.get_by_label("Id of a stored user").press("Enter")
        page.locator("#status", has_text="2 plays").wait_for()
        assert page.locator("#short li").count() == 10
        page.get_by_label("Id of a stored user").fill("nobody")
        page.get_by_role("button", name="Show").click()
        page.locator("#status", has_text="popular songs").wait_for()


def test_all_is_done_by_keyboard(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        page.get_by_label("Find a song").focus()
        page.keyboard.type("title 12")
        page.locator("#found li").first.wait_for()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.locator("#history li").wait_for()
        assert page.locator("#history li").get_attribute("data-song") == "song-12"


def test_where_keys_are_needed_the_page_asks_for_one(world: Workspace, browser: Any) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": f"read:{KEY}"})
    with served(world, keys) as url, page_of(browser, url) as page:
        page.get_by_label("API key").fill("wrong key, wrong key")
        page.get_by_role("button", name="Use").click()
        page.locator("#problem", has_text="valid key").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Enter")
        page.locator("#release", has_text="release").wait_for()
        find_and_play(page, "title 3", "Play Artist 3 – Title 3")
        page.locator("#status", has_text="1 play").wait_for()
        assert page.locator("#key-card").is_hidden()
