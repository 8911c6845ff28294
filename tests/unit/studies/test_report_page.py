"""The report in headless Chromium: no console error, no request, and what is drawn acts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium

from embedwright.studies.report import report

DESKTOP, PHONE = (1280, 900), (375, 812)
# the lowest contrast of a text on what lies behind it, as WCAG 2 computes it
CONTRAST = """(() => {
  const parts = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => parts(c).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const c = getComputedStyle(node).backgroundColor;
      if ((parts(c)[3] ?? 1) > 0) return c;
    }
    return "rgb(255, 255, 255)";
  };
  let lowest = [99, ""];
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || !node.offsetParent) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < lowest[0]) lowest = [ratio, node.tagName + ": " + node.textContent.slice(0, 40)];
  }
  return lowest;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium() is None and not os.environ.get("EMBEDWRIGHT_REQUIRE_BROWSER"):
        pytest.skip("no chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report([tiny_run], "embedwright report"), encoding="utf-8")
    return file


def test_the_browser_tells_of_errors_and_requests(browser: Browser, tmp_path: Path) -> None:
    """What the other tests rely on."""
    (tmp_path / "bad.html").write_text(
        "<script>console.error('oh'); setTimeout(() => { throw Error('ah') })</script><img src='http://127.0.0.1:9/x'>"
    )
    browser.open(tmp_path / "bad.html", *DESKTOP, "light")
    assert "http://127.0.0.1:9/x" in browser.requests
    assert any("oh" in fault for fault in browser.faults) and any("ah" in fault for fault in browser.faults)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_page_opens_without_errors_requests_or_sideways_scrolling(
    browser: Browser, page: Path, size: tuple[int, int], theme: str
) -> None:
    browser.open(page, *size, theme, touch=size == PHONE)
    assert (browser.faults, browser.requests) == ([], [])
    assert browser.run("document.documentElement.scrollWidth") == size[0]
    ratio, where = browser.run(CONTRAST)
    assert ratio >= 4.5, where
    charts = browser.run("[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('path.line').length)")
    assert charts == [2, 1, 1, 1, 3]
    cut = """[...document.querySelectorAll('.chart text')].filter((t) => {
      const [a, b] = [t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()];
      return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map((t) => t.textContent)"""
    assert browser.run(cut) == []


def test_a_curve_says_its_values_under_the_mouse(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP, "light")
    browser.run("document.getElementById('curves').scrollIntoView({behavior: 'instant'})")
    x, y, width, height = browser.run(
        "(() => { const b = document.querySelector('.chart svg').getBoundingClientRect();"
        " return [b.x, b.y, b.width, b.height] })()"
    )
    browser.mouse("mouseMoved", x + width - 14, y + height / 2)
    said = browser.run("document.getElementById('tip').innerText")
    assert said.startswith("step 6\nloss: ")
    browser.mouse("mouseMoved", 2, 2)
    assert browser.run("document.getElementById('tip').hidden") is True


def test_the_pictures_follow_the_width_of_the_window(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP, "light")
    browser.call("Emulation.setDeviceMetricsOverride", width=500, height=900, deviceScaleFactor=1, mobile=False)
    browser.run("new Promise((done) => setTimeout(() => requestAnimationFrame(done), 50)).then(() => 1)")
    assert browser.run("document.querySelector('.chart svg').viewBox.baseVal.width") < 480
    assert browser.run("document.documentElement.scrollWidth") == 500
