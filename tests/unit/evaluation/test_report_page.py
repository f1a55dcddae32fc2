"""The report in a real browser: readable and navigable at both widths and in both color schemes."""

from pathlib import Path
from typing import Any

import pytest
from browsers import light_of_ground, page_of, take_picture
from planted_reports import full_report

from rayrec.evaluation.report import html_page

SMALLEST = 12  # px, the smallest text size that is readable
FONT_SIZES = """
const sizes = {};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode())
  if (walker.currentNode.data.trim()) {
    const owner = walker.currentNode.parentElement;
    sizes[owner.tagName + "." + owner.className] = parseFloat(getComputedStyle(owner).fontSize);
  }
sizes
"""
CONTRAST = """
(() => {
const light = (color) => {
  const parts = color.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const ground = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  return color === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : color;
};
const contrasts = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode())
  if (walker.currentNode.data.trim()) {
    const owner = walker.currentNode.parentElement;
    const [darker, lighter] = [light(getComputedStyle(owner).color), light(ground(owner))].sort((a, b) => a - b);
    contrasts.push((lighter + 0.05) / (darker + 0.05));
  }
return Math.min(...contrasts);
})()
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(full_report())
    return path.as_uri()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_fits_its_window_and_can_be_read(browser: Any, url: str, width: int, scheme: str) -> None:
    with page_of(browser, url, viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        take_picture(page, f"report-{width}-{scheme}")
        assert page.locator("h1").inner_text().startswith("two-step finds 42 of 100 next new songs")
        assert (light_of_ground(page) < 0.2) == (scheme == "dark")
        page.evaluate("document.querySelectorAll('details').forEach((chapter) => { chapter.open = true; })")
        take_picture(page, f"report-{width}-{scheme}-open")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.evaluate(FONT_SIZES)
        assert not {element: size for element, size in sizes.items() if size < SMALLEST}
        assert page.evaluate(CONTRAST) >= 4.5  # the minimum of WCAG AA
        assert not page.locator("img:not([alt])").count()


def test_a_link_of_the_contents_opens_its_chapter(browser: Any, url: str) -> None:
    with page_of(browser, url) as page:
        links = page.locator("nav a")
        assert links.count() == page.locator("details").count() == 10
        for link in links.all():
            chapter = page.locator(f"details:has({link.get_attribute('href')})")
            assert chapter.get_attribute("open") is None
            link.click()
            assert chapter.get_attribute("open") is not None
            assert chapter.locator("summary").inner_text() == link.inner_text()
            assert chapter.locator("h3").first.is_visible()


def test_long_ids_fit_a_narrow_window(browser: Any, tmp_path: Path) -> None:
    long_id = "a1b2c3d4" * 8
    row = {"kind": "network", "users": "all", "target": "served", "metric": "recall", "k": 20, "plays": 9}
    statistics = {
        "results": [{**row, "model": "taste", "value": 0.4, "low": 0.3, "high": 0.5}],
        "examples": [{"last_plays": [long_id], "songs": [long_id]}],
    }
    path = tmp_path / "report.html"
    path.write_text(html_page(statistics, default="taste", about={"test range": long_id}))
    with page_of(browser, path.as_uri(), viewport={"width": 400, "height": 900}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_everything_focusable_has_a_name_and_the_chart_is_no_table(browser: Any, url: str) -> None:
    with page_of(browser, url) as page:
        page.evaluate("document.querySelectorAll('details').forEach((chapter) => { chapter.open = true; })")
        for region in page.locator("[tabindex]").all():
            assert region.get_attribute("role") == "region"
            assert region.get_attribute("aria-label") == region.locator("xpath=../h3").inner_text()
        assert page.get_by_role("group", name="Recall@20, as served").count() == 1
        assert page.locator("[role=table]").count() == 0
