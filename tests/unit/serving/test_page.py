"""The page in a real browser, against the application on uvicorn."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from browsers import light_of_ground, page_of, take_picture
from planted_reports import plant_report
from served import AT, NUM_SONGS, service, write_release, write_world

from rayrec.data import columns
from rayrec.importing.descriptions import DescribeConfig, describe
from rayrec.serving.middleware import Keys, load_keys
from rayrec.serving.routes import create_app
from rayrec.serving.serve_config import ServeConfig
from rayrec.storage import releases
from rayrec.storage.workspace import SONGS_TABLE, Workspace

KEY = "r" * 20
MARKUP_TITLE = "<img src=x onerror=\"document.title='broken'\"> Title 9"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The title of song 9 is HTML markup; song N was released in the year 1900 + N."""
    folder = tmp_path_factory.mktemp("page")
    workspace = Workspace(folder / "workspace")
    write_world(workspace)
    songs = workspace.read_table(SONGS_TABLE)
    titles = songs.column(columns.TITLE).to_pylist()
    titles[9] = MARKUP_TITLE
    workspace.write_table(SONGS_TABLE, songs.set_column(2, songs.schema.field(columns.TITLE), [titles]))
    lines = [f"song-{song},{1900 + song}-06-01\n" for song in range(NUM_SONGS)]
    (folder / "songs.csv").write_text("song,released\n" + "".join(lines))
    describe(workspace, DescribeConfig(), str(folder / "songs.csv"))
    write_release(workspace)
    return workspace


@contextmanager
def served(world: Workspace, keys: Keys | None = None) -> Iterator[str]:
    with service(world, keys) as replica:
        server = uvicorn.Server(uvicorn.Config(create_app(replica), host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


def find_and_play(page: Any, words: str, name: str) -> None:
    page.get_by_label("Find a song").fill(words)
    page.get_by_label("Songs found").get_by_role("button", name=name, exact=True).click()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
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
            answer = httpx.post(f"{url}/v1/recommendations", json={**body, "horizon": horizon}, timeout=60).json()
            shown_ids = [item.get_attribute("data-song") for item in page.locator(f"#{horizon} li").all()]
            assert shown_ids == [song["song_id"] for song in answer["songs"]]
        page.locator("#map g").first.wait_for()
        map_ids = {point.get_attribute("data-song") for point in page.locator("#map g").all()}
        assert {"song-3", "song-50"} < map_ids
        shown_reasons = [item.inner_text() for item in page.locator("#long .why").all()]
        assert shown_reasons == ["; ".join(song["reasons"]) for song in answer["songs"]]
        scores = [item.get_attribute("title").split()[1].rstrip(",") for item in page.locator("#long .score").all()]
        assert [float(score) for score in scores] == pytest.approx(
            [song["score"] for song in answer["songs"]], rel=6e-3
        )
        assert [item.inner_text() for item in page.locator("#long .score").all()] == [
            score if float(score) >= 0.001 else "<0.001" for score in scores
        ]
        list_box, query_box = page.locator("#short").bounding_box(), page.locator("#query").bounding_box()
        # On a wide screen they are side by side.
        assert (list_box["y"] + list_box["height"] <= query_box["y"]) == (width == 400)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert (light_of_ground(page) < 0.2) == (scheme == "dark")
        take_picture(page, f"page-{width}-{scheme}")
        page.get_by_role("button", name="Remove Artist 3 – Title 3").click()
        page.locator("#status", has_text="1 play").wait_for()


def test_titles_are_text_whatever_they_hold(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        find_and_play(page, "onerror", f"Play Artist 2 – {MARKUP_TITLE}")
        page.locator("#status", has_text="1 play").wait_for()
        assert page.locator("#history .name").inner_text().startswith("<img")
        assert page.locator("img").count() == 0
        assert page.title() == "rayrec"


def store_plays(url: str, user: str, songs: tuple[int, ...]) -> None:
    """Store plays of a user, each one millisecond after the previous one."""
    plays = [
        {"user_id": user, "song_id": f"song-{song}", "played_at": AT + position, "event_id": f"{user} {position}"}
        for position, song in enumerate(songs)
    ]
    for start in range(0, len(plays), 1_000):
        assert (
            httpx.post(f"{url}/v1/plays", json={"plays": plays[start : start + 1_000]}, timeout=60).status_code == 200
        )


def answer_request(page: Any, routes: list[Any], **response: Any) -> None:
    """Answer the one request in `routes`, by `response` or by the server, and wait until the page has processed it."""
    (route,) = routes
    with page.expect_response(route.request.url):
        route.fulfill(**response) if response else route.continue_()
    page.evaluate("new Promise((done) => setTimeout(done, 50))")


def listed_ids(page: Any, list_id: str) -> list[str]:
    return [item.get_attribute("data-song") for item in page.locator(f"#{list_id} li").all()]


def test_it_opens_with_an_example_user_and_the_popular_songs(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        page.locator("#status", has_text="3 plays").wait_for()
        assert page.locator("#whose").inner_text().startswith("For an example user who played ")
        assert page.locator("#short li").count() == page.locator("#long li").count() == 10
        page.locator("#found li").first.wait_for()
        assert page.locator("#found-title").inner_text() == "Popular songs"
        popular_ids = [song["song_id"] for song in httpx.get(f"{url}/v1/songs/popular", timeout=60).json()["songs"]]
        assert listed_ids(page, "found") == popular_ids
        page.locator("#found").get_by_title("Play").nth(1).click()  # a played song replaces the example user
        page.locator("#status", has_text="1 play").wait_for()
        assert listed_ids(page, "history") == popular_ids[1:2]
        page.get_by_role("button", name="Start over").click()
        page.locator("#whose", has_text="No song played yet").wait_for()
        page.locator("#short .why", has_text="most played").first.wait_for()


def test_the_plays_of_a_stored_user_are_listed_and_another_song_follows_them(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        store_plays(url, "ann", (3, 50))
        page.get_by_label("User ID").fill("ann")
        page.get_by_label("User ID").press("Enter")
        page.locator("#status", has_text="2 plays").wait_for()
        assert listed_ids(page, "history") == ["song-50", "song-3"]
        assert page.locator("#short li").count() == 10
        find_and_play(page, "title 12", "Play Artist 5 – Title 12")
        page.locator("#status", has_text="3 plays").wait_for()
        assert listed_ids(page, "history") == ["song-12", "song-50", "song-3"]
        assert not {"song-12", "song-50", "song-3"} & {*listed_ids(page, "short"), *listed_ids(page, "long")}
        assert "song-12" not in str(
            httpx.get(f"{url}/v1/users/ann/plays", timeout=60).json()
        )  # the page stores no play
        page.get_by_role("button", name="Remove Artist 5 – Title 12").click()
        page.locator("#status", has_text="2 plays").wait_for()
        page.get_by_label("User ID").fill("nobody")
        page.get_by_role("button", name="Show").click()
        page.locator("#status", has_text="popular songs").wait_for()
        assert listed_ids(page, "history") == []


def test_a_link_opens_what_was_shown(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        store_plays(url, "ann", (3, 50))
        page.get_by_label("User ID").fill("ann")
        page.get_by_role("button", name="Show").click()
        page.locator("#status", has_text="2 plays").wait_for()
        find_and_play(page, "title 12", "Play Artist 5 – Title 12")
        page.get_by_text("Filters").click()
        page.get_by_label("Only songs of this artist").fill("Artist 3")
        page.get_by_label("Number of songs").fill("7")
        page.get_by_label("Include songs already played").check()
        page.locator("#long .by", has_text="Artist 3").nth(6).wait_for()
        page.get_by_role("button", name="Copy link").click()
        page.locator("#copy", has_text="address of this page").or_(
            page.locator("#copy", has_text="Link copied")
        ).wait_for()
        link = page.url.removeprefix(url)
        with page_of(browser, url, link) as other_page:
            other_page.locator("#status", has_text="3 plays").wait_for()
            other_page.locator("#history", has_text="Title 12").wait_for()
            assert other_page.get_by_label("Only songs of this artist").input_value() == "Artist 3"
            assert other_page.locator("#filters").get_attribute("open") is not None
            for name in ("history", "short", "long"):
                assert listed_ids(other_page, name) == listed_ids(page, name)
            assert len(listed_ids(other_page, "short")) == 7
            assert other_page.url == page.url


def test_filters_keep_to_their_songs_and_say_where_none_fits(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        page.get_by_text("Filters").click()
        page.get_by_label("Only songs of this artist").fill("artist 2")
        page.get_by_label("Only songs of this artist").press("Enter")
        page.locator("#short .by", has_text="Artist 2").nth(9).wait_for()
        page.get_by_label("Only songs of this artist").fill("Abba")
        page.get_by_label("Only songs of this artist").press("Enter")
        page.locator("#problem", has_text="the catalog has no song by 'Abba'").wait_for()
        page.get_by_label("Only songs of this artist").fill("")
        page.get_by_label("Available in this market").fill("SE")
        page.get_by_label("Available in this market").press("Enter")
        page.locator("#problem", has_text="the catalog has no markets").wait_for()


def test_only_songs_released_in_the_span_are_recommended(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        page.get_by_text("Filters").click()
        page.get_by_label("Released from").fill("1940-01-01")
        page.locator("#short").get_by_text("Title").nth(9).wait_for()
        page.get_by_label("Released until").fill("1943-12-31")
        page.get_by_label("Released until").press("Enter")
        for horizon in ("short", "long"):
            page.wait_for_function("id => document.getElementById(id).childElementCount === 4", arg=horizon)
            assert sorted(listed_ids(page, horizon)) == ["song-40", "song-41", "song-42", "song-43"]
        page.get_by_label("Released from").fill("")
        page.get_by_label("Released until").fill("1899-12-31")
        page.locator("#short", has_text="No song matches the filters").wait_for()


def test_diversity_changes_the_lists_as_it_does_those_of_the_api(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3&song=song-50") as page:
        page.locator("#short .score").nth(9).wait_for()
        before = listed_ids(page, "short")
        page.get_by_label("Diversity").fill("1")
        body = {"history": ["song-3", "song-50"], "k": 10, "diversity": 1}
        answer = httpx.post(f"{url}/v1/recommendations", json=body, timeout=60).json()
        expected = [song["song_id"] for song in answer["songs"]]
        assert expected != before
        page.wait_for_function(
            "ids => [...document.querySelectorAll('#short li')].map(item => item.dataset.song).join() === ids",
            arg=",".join(expected),
        )
        assert page.locator("#shown-diversity").inner_text() == "1"


def test_a_recommended_song_is_played_from_its_list(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        page.locator("#long .score").nth(9).wait_for()
        for plays, horizon in enumerate(("short", "long"), start=2):
            first_id = listed_ids(page, horizon)[0]
            page.locator(f"#{horizon} li").first.get_by_title("Play").click()
            page.locator("#status", has_text=f"{plays} plays").wait_for()
            assert listed_ids(page, "history")[0] == first_id
            assert first_id not in listed_ids(page, horizon)


def test_songs_with_few_plays_are_shown_on_request_with_their_probabilities(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        page.locator("#short .score").first.wait_for()
        assert "few plays" not in page.locator("#short").inner_text()
        page.get_by_label("Share of songs with few plays").fill("0.5")
        for horizon in ("short", "long"):
            items = page.locator(f"#{horizon} li", has_text="random pick among songs with few plays, probability")
            items.first.wait_for()
            for item in items.all():
                assert (
                    httpx.get(f"{url}/v1/songs/{item.get_attribute('data-song')}/similar", timeout=60).json()["plays"]
                    < 20
                )
        assert page.locator("#shown-explore").inner_text() == "0.5"
        with page_of(browser, url, page.url.removeprefix(url)) as other_page:
            other_page.locator("#short .why", has_text="few plays").first.wait_for()


def test_a_song_shows_its_artist_plays_and_neighbors(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        page.get_by_role("button", name="About Artist 3 – Title 3", exact=True).first.click()
        song = httpx.get(f"{url}/v1/songs/song-3/similar?k=10", timeout=60).json()
        page.locator("#song-title", has_text="Title 3").wait_for()
        assert page.locator("#song-facts dd").all_inner_texts() == ["Artist 3", str(song["plays"]), "song-3"]
        assert listed_ids(page, "similar") == [neighbor["song_id"] for neighbor in song["songs"]]
        page.locator("#similar .title").first.click()
        page.locator("#song-facts", has_text=song["songs"][0]["song_id"]).wait_for()
        page.locator("#play-song").click()
        page.locator("#status", has_text="2 plays").wait_for()
        assert page.locator("#song").is_hidden()
        assert listed_ids(page, "history") == [song["songs"][0]["song_id"], "song-3"]


def test_a_touch_names_a_song_of_the_map(world: Workspace, browser: Any) -> None:
    size = {"width": 400, "height": 900}
    with served(world) as url, page_of(browser, url, "#song=song-3", viewport=size, has_touch=True) as page:
        page.locator("#map g").nth(1).wait_for()
        page.locator('#map g[data-song="song-3"] .hit').tap(force=True)
        page.locator("#spot", has_text="Artist").wait_for()
        labels = [text for text in page.locator("#map text").all_text_contents() if text]
        assert len(labels) == 1
        assert labels[0] == page.locator("#spot").inner_text()
        height = page.locator("#map text").filter(has_text="Artist").bounding_box()["height"]
        assert height >= 12  # px: large enough to read


def test_the_mouse_names_a_song_of_the_map_and_a_line_of_a_list_marks_its_song(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        page.locator("#map g").nth(1).wait_for()
        hint = page.locator("#spot").inner_text()
        page.locator('#map g[data-song="song-3"] .hit').hover(force=True)
        page.locator("#spot", has_text="Artist 3 – Title 3").wait_for()
        assert [text for text in page.locator("#map text").all_text_contents() if text] == ["Artist 3 – Title 3"]
        page.get_by_role("heading", name="Settings").hover()
        page.locator("#spot", has_text=hint).wait_for()
        assert not any(page.locator("#map text").all_text_contents())
        first_item = page.locator("#short li").first
        first_item.hover()
        marked_points = page.locator("#map .lit").locator("xpath=..")
        assert [point.get_attribute("data-song") for point in marked_points.all()] == [
            first_item.get_attribute("data-song")
        ]


def test_the_documentation_of_the_api_opens_without_the_internet(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        page.get_by_text("API documentation").click()
        page.locator(".opblock").first.wait_for()
        page.locator(".opblock", has_text="/v1/recommendations").first.click()
        page.locator(".opblock-body", has_text="Parameters").first.wait_for()
        take_picture(page, "docs")


def test_where_keys_are_needed_the_documentation_opens_and_sends_the_one_that_it_is_given(
    world: Workspace, browser: Any
) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": f"read:{KEY}"})
    with served(world, keys) as url, page_of(browser, url, "/docs") as page:
        page.locator(".scheme-container").get_by_role("button", name="Authorize").click()
        page.locator(".auth-container input").fill(KEY)
        page.locator(".auth-container").get_by_role("button", name="Apply credentials").click()
        page.locator(".auth-container").get_by_role("button", name="Close").click()
        operation = page.locator(".opblock", has=page.locator('[data-path="/v1/release"]'))
        operation.locator(".opblock-summary-control").click()
        operation.get_by_role("button", name="Try it out").click()
        operation.get_by_role("button", name="Execute").click()
        operation.locator(".live-responses-table .response-col_status", has_text="200").wait_for()


@pytest.mark.parametrize("key", [None, KEY])
def test_the_model_card_gives_the_quality_and_the_report(world: Workspace, browser: Any, key: str | None) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": f"read:{key}"}) if key else None
    release = releases.active_release(world)
    assert release is not None
    with served(world, keys) as url:
        with page_of(browser, url) as page:
            if key:
                page.get_by_label("API key").fill(key)
                page.get_by_label("API key").press("Enter")
            page.locator("#facts", has_text=release.id).wait_for()
            assert "Not evaluated" in page.locator("#facts").inner_text()
            assert page.get_by_text("Evaluation report").is_hidden()
            assert page.get_by_text("API documentation").get_attribute("href") == "docs"
        plant_report(world, release.inputs)
        try:
            with page_of(browser, url) as page:
                if key:
                    page.get_by_label("API key").fill(key)
                    page.get_by_label("API key").press("Enter")
                page.locator("#facts", has_text="two-step finds 42 of 100 next new songs").wait_for()
                assert "recall@20 0.420, MRR@20 0.200" in page.locator("#facts").inner_text()
                assert page.locator("#warning").inner_text() == "Warning: the test range leaked"
                if key:
                    with page.expect_download() as download:
                        page.get_by_text("Evaluation report").click()
                    assert "finds 42 of 100" in Path(download.value.path()).read_text()
                else:
                    page.get_by_text("Evaluation report").click()
                    page.locator("h1", has_text="finds 42 of 100").wait_for()
                    assert page.evaluate("getComputedStyle(document.querySelector('.bar')).position") == "absolute"
        finally:
            world.delete("reports")


def test_all_is_done_by_keyboard(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        page.get_by_label("Find a song").focus()
        page.keyboard.type("title 12")
        page.locator('#found li:first-child[data-song="song-12"]').wait_for()
        page.keyboard.press("Tab")  # moves the focus to the button for the song's details
        page.keyboard.press("Enter")
        page.locator("#song-title", has_text="Title 12").wait_for()
        page.keyboard.press("Escape")
        page.locator("#song").wait_for(state="hidden")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.locator("#status", has_text="1 play").wait_for()
        assert page.locator("#history li").get_attribute("data-song") == "song-12"


def test_screen_readers_announce_how_many_songs_match_a_search(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        search_status = page.locator("section", has=page.get_by_label("Find a song")).get_by_role("status")
        search_status.filter(has_text="Popular songs").wait_for()
        for words, length, shown_text in (
            ("title 123", 1, "Songs found: 1"),
            ("title", 20, f"Songs found: {NUM_SONGS}, the first 20 are listed"),
            ("no such song", 0, "No matching song"),
        ):
            page.get_by_label("Find a song").fill(words)
            search_status.filter(has_text=shown_text).wait_for()
            assert search_status.inner_text() == shown_text
            assert len(listed_ids(page, "found")) == length


def test_the_page_can_be_used_before_it_is_loaded(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        routes: list[Any] = []
        page.locator("#card").wait_for()
        page.route("**/v1/songs/popular?k=1", lambda route: routes.append(route))  # the example user is made from it
        page.reload()
        find_and_play(page, "title 3", "Play Artist 3 – Title 3")
        page.locator("#status", has_text="1 play").wait_for()
        assert page.locator("#card").is_hidden()
        routes[0].continue_()
        page.locator("#card").wait_for()
        page.locator("#status", has_text="1 play").wait_for()
        assert page.locator("#history li").get_attribute("data-song") == "song-3"
        assert page.evaluate("document.activeElement.closest('#found')") is not None  # the focus stays in the list


def test_where_keys_are_needed_the_page_asks_for_one(world: Workspace, browser: Any) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": f"read:{KEY}"})
    with served(world, keys) as url, page_of(browser, url) as page:
        page.get_by_label("API key").fill("wrong key, wrong key")
        page.get_by_role("button", name="Use").click()
        page.locator("#problem", has_text="valid key").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Enter")
        page.locator("#release", has_text="release").wait_for()
        assert page.locator("#key-card").is_hidden()
        assert page.evaluate("document.activeElement.id") == "query"
        find_and_play(page, "title 3", "Play Artist 3 – Title 3")
        page.locator("#status", has_text="1 play").wait_for()


def test_the_user_shown_last_counts_whichever_answer_comes_last(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        store_plays(url, "ann", (3, 50))
        store_plays(url, "bob", (9,))
        routes: list[Any] = []
        page.route("**/v1/users/ann/plays*", lambda route: routes.append(route))
        for user in ("ann", "bob"):
            page.get_by_label("User ID").fill(user)
            page.get_by_role("button", name="Show").click()
        page.locator("#status", has_text="1 play").wait_for()
        answer_request(page, routes)
        find_and_play(page, "title 12", "Play Artist 5 – Title 12")
        page.locator("#status", has_text="2 plays").wait_for()
        assert listed_ids(page, "history") == ["song-12", "song-9"]


def test_the_user_of_a_new_link_gets_no_plays_of_the_user_who_was_still_loading(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        store_plays(url, "ann", (3, 50))
        store_plays(url, "bob", (9,))
        plays_routes: list[Any] = []
        release_routes: list[Any] = []
        page.locator("#card").wait_for()
        page.route("**/v1/users/ann/plays*", lambda route: plays_routes.append(route))
        page.route("**/v1/release", lambda route: release_routes.append(route))
        page.get_by_label("User ID").fill("ann")
        with page.expect_request("**/v1/users/ann/plays*"):
            page.get_by_role("button", name="Show").click()
        with page.expect_request("**/v1/release"):
            page.evaluate("location.hash = '#user=bob'")
        answer_request(page, plays_routes)
        answer_request(page, release_routes)
        page.locator("#status", has_text="1 play").wait_for()
        assert listed_ids(page, "history") == ["song-9"]
        find_and_play(page, "title 12", "Play Artist 5 – Title 12")
        page.locator("#status", has_text="2 plays").wait_for()
        assert listed_ids(page, "history") == ["song-12", "song-9"]


def test_start_over_while_a_user_loads_leaves_none_of_its_plays(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        store_plays(url, "ann", (3, 50))
        routes: list[Any] = []
        page.locator("#status", has_text="3 plays").wait_for()
        page.route("**/v1/users/ann/plays*", lambda route: routes.append(route))
        page.get_by_label("User ID").fill("ann")
        page.get_by_role("button", name="Show").click()
        page.get_by_role("button", name="Start over").click()
        page.locator("#whose", has_text="No song played yet").wait_for()
        answer_request(page, routes)
        find_and_play(page, "title 12", "Play Artist 5 – Title 12")
        page.locator("#status", has_text="1 play").wait_for()
        assert listed_ids(page, "history") == ["song-12"]


def test_plays_that_could_not_be_read_are_read_before_another_song_is_answered(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        store_plays(url, "ann", (3, 50))
        page.route("**/v1/users/ann/plays*", lambda route: route.fulfill(status=503, json={"detail": "try later"}))
        page.get_by_label("User ID").fill("ann")
        page.get_by_role("button", name="Show").click()
        page.locator("#problem", has_text="try later").wait_for()
        page.unroute("**/v1/users/ann/plays*")
        find_and_play(page, "title 12", "Play Artist 5 – Title 12")
        page.locator("#status", has_text="3 plays").wait_for()
        assert listed_ids(page, "history") == ["song-12", "song-50", "song-3"]
        assert page.locator("#problem").is_hidden()


def test_another_song_follows_all_plays_of_a_user_with_over_1000(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url) as page:
        songs = (3, *[50] * 1_100)
        store_plays(url, "cleo", songs)
        page.get_by_label("User ID").fill("cleo")
        page.get_by_role("button", name="Show").click()
        page.locator("#whose", has_text="For user cleo.").wait_for()
        with page.expect_request(lambda request: "history" in (request.post_data or "")) as request_info:
            find_and_play(page, "title 12", "Play Artist 5 – Title 12")
        history = [play["song_id"] for play in request_info.value.post_data_json["history"]]
        assert history == [*(f"song-{song}" for song in songs), "song-12"]


def test_an_error_stays_until_its_own_request_succeeds(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3&artist=Abba") as page:
        page.locator("#problem", has_text="the catalog has no song by 'Abba'").wait_for()
        page.get_by_label("Find a song").fill("title 50")
        page.locator('#found li:first-child[data-song="song-50"]').wait_for()
        assert "Abba" in page.locator("#problem").inner_text()
        page.get_by_label("Only songs of this artist").fill("")
        page.get_by_label("Only songs of this artist").press("Enter")
        page.locator("#short .score").first.wait_for()
        assert page.locator("#problem").is_hidden()


def test_the_late_failure_of_an_earlier_search_is_not_shown(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        routes: list[Any] = []
        page.locator("#found li").first.wait_for()
        page.route("**/v1/songs?*query=first*", lambda route: routes.append(route))
        with page.expect_request("**/v1/songs?*query=first*"):
            page.get_by_label("Find a song").fill("first")
        page.get_by_label("Find a song").fill("title 50")
        page.locator('#found li:first-child[data-song="song-50"]').wait_for()
        answer_request(page, routes, status=503, json={"detail": "try later"})
        assert page.locator("#problem").is_hidden()
        assert listed_ids(page, "found")[0] == "song-50"


def test_a_link_is_kept_while_a_key_is_asked_for(world: Workspace, browser: Any) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": f"read:{KEY}"})
    with served(world, keys) as url, page_of(browser, url, "#song=song-3&song=song-50&k=7") as page:
        page.locator("#problem", has_text="valid key").wait_for()
        page.get_by_role("button", name="Copy link").click()
        page.get_by_label("Diversity").fill("1")
        assert page.url == f"{url}/#song=song-3&song=song-50&k=7&diversity=1"
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Enter")
        page.locator("#status", has_text="2 plays").wait_for()
        assert listed_ids(page, "history") == ["song-50", "song-3"]
        assert len(listed_ids(page, "short")) == 7


def test_a_key_that_may_not_read_can_be_replaced_after_a_reload(world: Workspace, browser: Any) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": f"read:{KEY},write:{'w' * 20}"})
    with served(world, keys) as url, page_of(browser, url, "#song=song-3") as page:
        page.get_by_label("API key").fill("w" * 20)
        page.get_by_role("button", name="Use").click()
        page.locator("#problem", has_text="lacks the 'read' role").wait_for()
        page.reload()
        page.locator("#problem", has_text="lacks the 'read' role").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Enter")
        page.locator("#status", has_text="1 play").wait_for()


def test_a_key_that_no_header_can_hold_is_refused(world: Workspace, browser: Any) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": f"read:{KEY}"})
    with served(world, keys) as url, page_of(browser, url) as page:
        page.get_by_label("API key").fill("“" + KEY + "”")
        page.get_by_role("button", name="Use").click()
        page.locator("#problem", has_text="not printable ASCII").wait_for()
        page.reload()
        page.locator("#problem", has_text="valid key").wait_for()
        assert page.get_by_label("API key").is_visible()


def test_the_focus_stays_at_its_place_in_a_list_that_changes(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        page.locator("#short .score").nth(9).wait_for()
        for plays in (2, 3):
            page.locator("#short li").nth(2).get_by_title("Play").focus()
            page.keyboard.press("Enter")
            page.locator("#status", has_text=f"{plays} plays").wait_for()
            assert page.evaluate(
                "document.activeElement === document.querySelectorAll('#short li')[2].querySelector('[title=Play]')"
            )
        page.locator("#history li").nth(1).get_by_title("Remove").focus()
        page.keyboard.press("Enter")
        page.locator("#status", has_text="2 plays").wait_for()
        assert page.evaluate(
            "document.activeElement === document.querySelectorAll('#history li')[1].querySelector('[title=Remove]')"
        )
        page.keyboard.press("Enter")
        page.locator("#status", has_text="1 play").wait_for()
        assert page.evaluate("document.activeElement.id") == "query"


def open_song(page: Any) -> None:
    page.get_by_role("button", name="About Artist 3 – Title 3", exact=True).first.click()
    page.locator("#song-title", has_text="Title 3").wait_for()
    page.locator("#similar .title").first.wait_for()


def test_a_song_that_cannot_be_shown_closes_the_dialog_before_the_error(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        open_song(page)
        page.route("**/similar*", lambda route: route.fulfill(status=503, json={"detail": "try later"}))
        page.locator("#similar .title").first.click()
        page.locator("#problem", has_text="try later").wait_for()
        assert page.locator("#song").is_hidden()


@pytest.mark.parametrize("end", ["Close", "Escape", "Play"])
def test_a_dialog_that_was_closed_stays_closed_when_a_late_song_comes(world: Workspace, browser: Any, end: str) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        open_song(page)
        routes: list[Any] = []
        page.route("**/similar*", lambda route: routes.append(route))
        with page.expect_request("**/similar*"):
            page.locator("#similar .title").first.click()
        if end == "Escape":
            page.keyboard.press("Escape")
        else:
            page.locator("#song").get_by_role("button", name=end, exact=True).click()
        page.locator("#song").wait_for(state="hidden")
        answer_request(page, routes)
        assert page.locator("#song").is_hidden()


def test_the_focus_stays_in_the_dialog_when_another_song_is_shown_in_it(world: Workspace, browser: Any) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        open_song(page)
        neighbor_id = listed_ids(page, "similar")[1]
        page.locator("#similar .title").nth(1).focus()
        page.keyboard.press("Enter")
        page.locator("#song-facts", has_text=neighbor_id).wait_for()
        assert page.evaluate("document.activeElement.id") == "play-song"


def test_a_click_on_the_edge_of_the_dialog_leaves_it_open_and_one_outside_closes_it(
    world: Workspace, browser: Any
) -> None:
    with served(world) as url, page_of(browser, url, "#song=song-3") as page:
        open_song(page)
        box = page.locator("#song").bounding_box()
        page.mouse.click(box["x"] + 6, box["y"] + 6)
        assert page.locator("#song").is_visible()
        page.mouse.click(box["x"] - 6, box["y"] + 6)
        assert page.locator("#song").is_hidden()


def test_a_probability_near_one_is_written_in_digits(world: Workspace, browser: Any) -> None:
    def change(route: Any) -> None:
        body = route.fetch().json()
        for song, probability in zip(body["songs"], (0.995, 1, 0.0123), strict=False):
            song.update(explored=True, probability=probability)
        route.fulfill(json=body)

    with served(world) as url, page_of(browser, url) as page:
        page.locator("#status", has_text="3 plays").wait_for()
        page.route("**/v1/recommendations", change)
        page.get_by_label("Number of songs").fill("3")
        page.get_by_label("Number of songs").press("Enter")
        page.locator("#short .why", has_text="probability").first.wait_for()
        texts = page.locator("#short .why").all_inner_texts()
        assert [text.partition("probability ")[2].partition(" %")[0] for text in texts] == ["100", "100", "1.2"]


def test_long_ids_fit_a_narrow_window(world: Workspace, browser: Any) -> None:
    long_id, size = "a1b2c3d4" * 8, {"width": 400, "height": 900}

    def change(route: Any) -> None:
        route.fulfill(json={**route.fetch().json(), "title": long_id})

    with served(world) as url, page_of(browser, url, f"#user={long_id}&artist={long_id}", viewport=size) as page:
        page.locator("#problem", has_text=long_id).wait_for()
        page.locator("#whose", has_text=long_id).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.route("**/similar*", change)
        page.locator("#found .title").first.click()
        page.locator("#song-title", has_text=long_id).wait_for()
        assert page.evaluate("(({ scrollWidth, clientWidth }) => scrollWidth - clientWidth)(at('song'))") == 0
