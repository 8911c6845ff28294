"""The report in headless Chromium: no console error, no request, and what is drawn acts."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CONTRAST, Browser

from embedwright.studies.report.page import report

DESKTOP, PHONE = (1280, 900), (375, 812)


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
    assert charts == [2, 1, 1, 1, 3, 3, 3]
    cut = """[...document.querySelectorAll('.chart text')].filter((t) => {
      const [a, b] = [t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()];
      return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map((t) => t.textContent)"""
    assert browser.run(cut) == []


def test_a_curve_says_its_values_under_the_mouse(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP, "light")
    browser.run("document.getElementById('curves').scrollIntoView({behavior: 'instant'})")
    browser.settle()
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


# ---- the map


STATE = "(() => { const d = document.getElementById('canvas').dataset; return [+d.zoom, +d.x, +d.y] })()"
PIXELS = "document.getElementById('canvas').toDataURL()"
# where the points lie in the window: of each, what the page's own script computes it from
POINTS = """(() => {
  const { map } = JSON.parse(document.getElementById('drawn').textContent), c = document.getElementById('canvas');
  c.scrollIntoView({behavior: 'instant', block: 'center'});
  const b = c.getBoundingClientRect(), size = Math.min(c.clientWidth, c.clientHeight) - 40;
  return map.points.map(([x, y, k], i) => [b.left + c.clientLeft + c.clientWidth / 2 + (x - 0.5) * size,
    b.top + c.clientTop + c.clientHeight / 2 + (y - 0.5) * size, map.labels[k].name + '\\n' + map.texts[i]]);
})()"""
TIP = "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"


def test_a_point_of_the_map_says_its_label_and_text(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP, "light")
    points = browser.run(POINTS)
    browser.settle()
    before = browser.run(PIXELS)
    for x, y, said in (points[0], points[-1]):  # the last one is the text with a script in it
        browser.mouse("mouseMoved", x, y)
        same_place = [other[2] for other in points if abs(other[0] - x) + abs(other[1] - y) < 2]
        assert browser.run(TIP) in same_place and said in same_place
        assert browser.run(PIXELS) != before  # a ring around it
    assert "<script>alert(1)</script>" in points[-1][2]
    browser.mouse("mouseMoved", 3, 3)
    assert browser.run(TIP) is None and browser.run(PIXELS) == before
    assert (browser.faults, browser.requests) == ([], [])


def test_the_wheel_zooms_about_the_mouse_and_a_drag_moves(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP, "dark")
    x, y, said = browser.run(POINTS)[0]
    browser.settle()
    before = browser.run(PIXELS)
    assert browser.run(STATE) == [1, 0, 0]
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-400)
    zoom, _, _ = browser.run(STATE)
    assert zoom == pytest.approx(2.718, abs=0.01) and browser.run(PIXELS) != before
    browser.mouse("mouseMoved", x + 1, y)
    assert browser.run(TIP) == said  # what was under the mouse still is
    browser.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    browser.mouse("mouseMoved", x - 60, y + 30, button="left", buttons=1)
    browser.mouse("mouseReleased", x - 60, y + 30, button="left", clickCount=1)
    browser.mouse("mouseMoved", x - 59, y + 30)
    assert browser.run(TIP) == said
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=4000)
    browser.mouse("mouseMoved", 3, 3)
    assert browser.run(STATE) == [1, 0, 0] and browser.run(PIXELS) == before


def test_keys_and_buttons_zoom_move_and_reset(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP, "light")
    browser.run("document.getElementById('canvas').focus()")
    seen = []
    for key in ("+", "ArrowLeft", "ArrowDown", "-", "0"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key if len(key) == 1 else "")
        seen.append(browser.run(STATE))
    assert seen == [[1.4, 0, 0], [1.4, 40, 0], [1.4, 40, -40], [1, 0, 0], [1, 0, 0]]
    for name, after in (("in", 1.6), ("in", 2.56), ("out", 1.6), ("reset", 1)):
        browser.run(f"document.querySelector('[data-do={name}]').click()")
        assert browser.run(STATE)[0] == pytest.approx(after)


def test_the_eleventh_label_has_another_shape(browser: Browser, page: Path) -> None:
    """The corners of a point's square have its colour, those of a disc have not."""
    browser.open(page, *DESKTOP, "light")
    script = """(() => {
      const canvas = document.getElementById('canvas'), brush = canvas.getContext('2d');
      const { map } = JSON.parse(document.getElementById('drawn').textContent);
      document.querySelectorAll('[data-label]')[LABEL].click();
      const size = Math.min(canvas.clientWidth, canvas.clientHeight) - 40;
      const corner = (x, y) => brush.getImageData(Math.round(canvas.clientWidth / 2 + (x - 0.5) * size + 3),
        Math.round(canvas.clientHeight / 2 + (y - 0.5) * size + 3), 1, 1).data[3];
      return Math.min(...map.points.filter((p) => p[2] === LABEL).map(([x, y]) => corner(x, y)));
    })()"""
    assert browser.run(script.replace("LABEL", "10")) > 200 > browser.run(script.replace("LABEL", "9"))
    assert browser.run('document.querySelectorAll(\'[data-label="10"] .shape1, [data-label="9"] .shape0\').length') == 2


def test_a_label_can_be_seen_alone(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP, "light")
    before = browser.run(PIXELS)
    pressed = "[...document.querySelectorAll('[data-label]')].map((b) => b.getAttribute('aria-pressed'))"
    browser.run("document.querySelector('[data-label]').click()")
    assert browser.run(pressed) == ["true", *["false"] * 10] and browser.run(PIXELS) != before
    browser.run("document.querySelector('[data-label]').click()")
    assert browser.run(pressed) == ["false"] * 11 and browser.run(PIXELS) == before


def test_two_fingers_zoom_and_a_tap_says_the_text(browser: Browser, page: Path) -> None:
    browser.open(page, *PHONE, "light", touch=True)
    x, y, _ = browser.run(POINTS)[0]
    browser.settle()
    middle = browser.run(
        "(() => { const b = document.getElementById('canvas').getBoundingClientRect();"
        " return [b.left + b.width / 2, b.top + b.height / 2] })()"
    )

    def fingers(kind: str, *points: tuple[float, float]) -> None:
        touching = [{"x": px, "y": py, "id": i} for i, (px, py) in enumerate(points)]
        browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=touching)

    fingers("touchStart", (x, y))
    fingers("touchEnd")
    assert browser.run(TIP) is not None
    fingers("touchStart", (middle[0] - 20, middle[1]), (middle[0] + 20, middle[1]))
    for far in (30, 40):
        fingers("touchMove", (middle[0] - far, middle[1]), (middle[0] + far, middle[1]))
    fingers("touchEnd")
    assert browser.run(STATE)[0] == pytest.approx(2.0, abs=0.05)


def test_the_map_takes_the_colours_of_a_theme_that_changes(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP, "light")
    before = browser.run(PIXELS)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.settle()
    assert browser.run(PIXELS) != before
