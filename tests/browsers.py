"""Chromium for tests of pages, which must not use the internet; RAYREC_SCREENSHOTS=DIR saves screenshots."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser without a window; skip the test if Playwright or Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'rayrec[dev]'")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no {CHROMIUM}: install Debian's package chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Any, url: str, link: str = "", **options: Any) -> Iterator[Any]:
    """Open a page; fail on requests to other hosts, uncaught errors and violations of the Content Security Policy."""
    context = browser.new_context(**options)
    page = context.new_page()
    problems: list[str] = []
    page.on("request", lambda request: None if request.url.startswith((url, "data:")) else problems.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console", lambda message: problems.append(message.text) if "Content Security Policy" in message.text else None
    )
    page.set_default_timeout(30_000)
    page.goto(url + link)
    yield page
    context.close()
    assert not problems


def take_picture(page: Any, name: str) -> None:
    """Save a screenshot of the whole page if RAYREC_SCREENSHOTS names a folder."""
    if folder := os.environ.get("RAYREC_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def light_of_ground(page: Any) -> float:
    """Return the brightness of the page's background, from 0 (black) to 1 (white)."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3])) / (3 * 255)
