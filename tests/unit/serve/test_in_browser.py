"""The page in headless Chromium, on a real server with two indexes of a tiny model: what a person does, and sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from browser import CONTRAST, Browser

from embedwright.index.index import Hit, Index
from embedwright.model.embedder import Embedder
from embedwright.serve.app import create_app

DESKTOP, PHONE = (1280, 900), (360, 740)
READY = """document.readyState === 'complete' && !document.getElementById('facts').textContent.startsWith('Opening')
  && document.getElementById('status').textContent !== 'Searching…' && !document.querySelector('[aria-busy=true]')"""
HITS = """[...document.querySelectorAll('.side')].map((side) =>
  [...side.querySelectorAll('.hit')].map((hit) => hit.dataset.id))"""
STATUS = "document.getElementById('status').textContent"
TIP = "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"
Serving = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def address(serving: Serving, told: Embedder, index: Index, model: Embedder, other: Index) -> Iterator[str]:
    """Of a server with the page and two models."""
    against = create_app(model, name="other", index=other)
    with serving(told, index=index, page=True, against=against) as server:
        yield f"http://127.0.0.1:{server.port}/"


def until(browser: Browser, what: str = READY) -> None:
    ends = time.monotonic() + 30
    while not browser.run(what):
        assert time.monotonic() < ends, what
        time.sleep(0.02)


def visit(browser: Browser, address: str, size: tuple[int, int] = DESKTOP, theme: str = "light") -> None:
    browser.open(address, *size, theme, touch=size == PHONE)
    until(browser)


def press(browser: Browser, key: str) -> None:
    text, code = {"Enter": "\r"}.get(key, key if len(key) == 1 else ""), {"Enter": 13, "Escape": 27}.get(key, 0)
    browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
    browser.call("Input.dispatchKeyEvent", type="keyUp", key=key)
    until(browser)


def write(browser: Browser, field: str, text: str) -> None:
    """Types into a field, in place of what is in it."""
    browser.run(f"document.getElementById('{field}').focus(), document.getElementById('{field}').select()")
    browser.call("Input.insertText", text=text) if text else press(browser, "Delete")


def ids(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def quiet(browser: Browser, address: str) -> bool:
    """No error in the console, and nothing asked of another server."""
    elsewhere = [url for url in browser.requests if not url.startswith((address, "data:"))]
    return (browser.faults, elsewhere) == ([], [])


def test_a_typed_search_shows_what_the_index_finds(
    browser: Browser, address: str, index: Index, told: Embedder
) -> None:
    visit(browser, address)
    press(browser, "/")  # the query has the focus already: this is typed, and replaced
    write(browser, "query", "how do tides work?")
    press(browser, "Enter")
    wanted = index.search(told, ["how do tides work?"], k=10)[0]
    assert browser.run(HITS) == [ids(wanted)] and len(wanted) == 10
    assert browser.run(STATUS).startswith("10 hits in ")
    scores = browser.run("[...document.querySelectorAll('.score')].map((each) => each.lastChild.textContent)")
    assert [float(score) for score in scores] == pytest.approx([hit.score for hit in wanted], abs=6e-4)
    marks = browser.run(
        "[...document.querySelectorAll('.hit')].map((hit) => { hit.querySelector('.title').click();"
        " return [hit.querySelector('.text').textContent, hit.querySelector('mark')?.textContent ?? null] })"
    )
    for (text, mark), hit in zip(marks, wanted, strict=True):  # emoji count as one letter on both sides
        assert text == hit.text and mark in (None, hit.text[hit.start : hit.end])
    assert any(mark for _, mark in marks)
    assert quiet(browser, address)


def test_the_address_holds_the_search_and_back_goes_back(
    browser: Browser, address: str, index: Index, told: Embedder
) -> None:
    visit(browser, f"{address}?q=moon&k=3&where=lang%3Den&task=Find+names")
    wanted = index.search(told, ["moon"], k=3, task="Find names", where=["lang=en"])[0]
    assert browser.run(HITS) == [ids(wanted)]
    shown = browser.run("['query', 'task', 'k'].map((id) => document.getElementById(id).value)")
    assert shown == ["moon", "Find names", "3"]
    write(browser, "query", "dog")
    press(browser, "Enter")
    assert "q=dog" in browser.run("location.search")
    browser.run("history.back()")
    until(browser, "document.getElementById('query').value === 'moon'")
    until(browser)
    assert browser.run(HITS) == [ids(wanted)] and quiet(browser, address)


def test_another_instruction_gives_other_hits(browser: Browser, address: str, index: Index, told: Embedder) -> None:
    visit(browser, f"{address}?q=moon")
    plain = browser.run(HITS)[0]
    own = browser.run("document.getElementById('task').value")
    assert own == "Find the text about it" and plain == ids(index.search(told, ["moon"])[0])
    write(browser, "task", "Find the animal that is named in the text")
    press(browser, "Enter")
    wanted = index.search(told, ["moon"], task="Find the animal that is named in the text")[0]
    assert browser.run(HITS) == [ids(wanted)] and ids(wanted) != plain
    browser.run("document.getElementById('task').value = '', document.getElementById('task').focus()")  # means none
    press(browser, "Enter")
    assert browser.run(HITS) == [ids(index.search(told, ["moon"], task="")[0])]
    assert browser.run("location.search") == "?q=moon&task="
    browser.run("document.getElementById('reset').click()")
    until(browser)
    assert browser.run(HITS) == [plain] and browser.run("document.getElementById('task').value") == own


def test_filters_are_added_by_form_and_by_a_value_of_a_hit(
    browser: Browser, address: str, index: Index, told: Embedder
) -> None:
    visit(browser, f"{address}?q=moon")
    browser.run("document.getElementById('column').value = 'year', document.getElementById('sign').value = '>='")
    write(browser, "value", "2000")
    press(browser, "Enter")
    browser.run("[...document.querySelectorAll('.hit .chip')].find((each) => each.textContent === 'lang: de').click()")
    until(browser)
    wanted = index.search(told, ["moon"], where=["year>=2000", "lang=de"])[0]
    assert browser.run(HITS) == [ids(wanted)] and wanted
    assert browser.run("[...document.querySelectorAll('#conditions button')].map((each) => each.textContent)") == [
        "year >= 2000 ×", "lang = de ×",
    ]  # fmt: skip
    browser.run("document.querySelectorAll('#conditions button')[1].click()")
    until(browser)
    assert browser.run(HITS) == [ids(index.search(told, ["moon"], where=["year>=2000"])[0])]
    browser.run("document.querySelectorAll('#conditions button')[0].click()")
    until(browser)
    # a value with a comma and outer spaces, which no text of a condition can hold
    browser.run("[...document.querySelectorAll('.hit .chip')].find((each) => each.textContent.includes('at,')).click()")
    until(browser)
    assert browser.run(HITS) == [["d9"]]
    visit(browser, browser.run("location.href"))
    assert browser.run(HITS) == [["d9"]] and quiet(browser, address)


def test_keys_go_through_the_hits_and_open_one(browser: Browser, address: str) -> None:
    visit(browser, f"{address}?q=moon")
    here = "[document.activeElement.closest('.hit')?.dataset.id ?? document.activeElement.id]"
    order = browser.run(HITS)[0]
    seen = []
    for key in ("/", "ArrowDown", "ArrowDown", "ArrowUp", "Escape"):
        press(browser, key)
        seen += browser.run(here)
    assert seen == ["query", order[0], order[1], order[0], "query"]
    press(browser, "ArrowDown")
    press(browser, "Enter")
    assert browser.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    press(browser, "/")
    assert browser.run(here) == ["query"]


def test_two_models_stand_side_by_side_and_shared_hits_are_connected(
    browser: Browser, address: str, told: Embedder, index: Index, model: Embedder, other: Index
) -> None:
    visit(browser, f"{address}?q=moon&k=5")
    browser.run("document.getElementById('both').click()")
    until(browser)
    left, right = ids(index.search(told, ["moon"], k=5)[0]), ids(other.search(model, ["moon"], k=5)[0])
    assert browser.run(HITS) == [left, right] and left != right
    shared = [id for id in left if id in right]
    assert shared and browser.run(STATUS).startswith(f"{len(shared)} of 5 hits are in both lists")
    lines = "[...document.querySelectorAll('.lines path')].map((line) => line.dataset.id)"
    until(browser, f"({lines}).length")
    assert browser.run(lines) == shared
    said = browser.run("[...document.querySelectorAll('.side:first-child .shared')].map((each) => each.textContent)")
    assert said == [f"rank {right.index(id) + 1} with other" for id in shared]
    assert quiet(browser, address)


def test_a_document_with_a_script_shows_as_text(browser: Browser, address: str) -> None:
    visit(browser, f"{address}?q=script&k=100")
    browser.run("document.querySelectorAll('.title').forEach((title) => title.click())")
    shown = browser.run("document.getElementById('hits').textContent")
    assert "<script>document.title='owned'</script>" in shown and "<img src=x onerror=" in shown
    assert browser.run("document.querySelectorAll('main script, main img').length") == 0
    assert browser.run("document.title").startswith("script") and quiet(browser, address)


def test_the_map_says_its_points_and_marks_the_hits(
    browser: Browser, address: str, index: Index, told: Embedder
) -> None:
    visit(browser, f"{address}?q=moon&k=4&view=map&colour=lang")
    until(browser, "Boolean(document.getElementById('canvas').dataset.zoom)")
    canvas = "document.getElementById('canvas')"
    assert browser.run(f"{canvas}.dataset.marked") == "4"
    browser.run(f"{canvas}.focus()")
    browser.settle()
    press(browser, "n")
    first = index.search(told, ["moon"], k=4)[0][0]
    title = first.title or " ".join(first.text.split())[:80]
    assert browser.run(TIP) == f"{title}\nlang: {first.metadata['lang'] or 'no value'}\nhit 1"
    # the mouse on the same place says the same
    x, y = browser.run("['left', 'top'].map((edge) => parseFloat(document.getElementById('tip').style[edge]) - 14)")
    press(browser, "Escape")
    for place, said in (((x, y), title), ((3, 3), ""), ((x, y), title)):
        browser.mouse("mouseMoved", *place)
        assert (browser.run(TIP) or "").startswith(said) and bool(browser.run(TIP)) == bool(said)
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-400)
    assert float(browser.run(f"{canvas}.dataset.zoom")) == pytest.approx(2.718, abs=0.01)
    before = browser.run(f"{canvas}.toDataURL()")
    browser.run("document.querySelector('.legend button').click()")
    assert browser.run(f"{canvas}.toDataURL()") != before
    for key, zoom in (("0", 1), ("+", 1.4), ("-", 1)):
        browser.run(f"{canvas}.focus()")
        press(browser, key)
        assert float(browser.run(f"{canvas}.dataset.zoom")) == pytest.approx(zoom, abs=1e-3)
    assert quiet(browser, address)


def test_a_point_of_the_map_opens_its_document(browser: Browser, address: str, index: Index, told: Embedder) -> None:
    visit(browser, f"{address}?q=moon&view=map&colour=lang")
    canvas, sheet = "document.getElementById('canvas')", "document.querySelector('dialog.sheet')"
    until(browser, f"Boolean({canvas}.dataset.zoom)")
    browser.run(f"{canvas}.focus()")
    browser.settle()
    text = f"{sheet}.open ? {sheet}.querySelector('.text')?.textContent ?? null : null"
    press(browser, "n")
    x, y = browser.run("['left', 'top'].map((edge) => parseFloat(document.getElementById('tip').style[edge]) - 14)")
    press(browser, "Enter")
    until(browser, f"({text}) !== null")
    first = index.search(told, ["moon"])[0][0]
    assert browser.run(text) == first.text and first.id in browser.run(f"{sheet}.querySelector('.note').textContent")
    press(browser, "Escape")
    until(browser, f"!{sheet}.open")
    assert browser.run(f"document.activeElement === {canvas}")
    press(browser, "Enter")  # points at the document in the middle
    middle = browser.run(TIP)
    press(browser, "Enter")
    until(browser, f"({text}) !== null")
    assert middle.splitlines()[0] == browser.run(f"{sheet}.querySelector('h2').textContent")
    browser.run(f"{sheet}.querySelector('button').click()")
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y, button="left", clickCount=1)
    until(browser, f"({text}) !== null")
    assert browser.run(text) == first.text and quiet(browser, address)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("view", ["", "q=moon&both=", "q=moon&view=map", "q=moon&where=bad%3D1"])
def test_every_view_fits_a_phone_and_can_be_read(browser: Browser, address: str, view: str, theme: str) -> None:
    visit(browser, f"{address}?{view}", PHONE, theme)
    assert browser.run("document.documentElement.scrollWidth") == PHONE[0]
    ratio, text = browser.run(CONTRAST)
    assert ratio >= 4.5, text
    unnamed = """[...document.querySelectorAll('button, input, select, canvas')].filter((each) => each.offsetParent
      && !(each.getAttribute('aria-label') || each.labels?.length || each.textContent.trim())).map((each) => each.id)"""
    assert browser.run(unnamed) == []


# ---- when something is wrong


def test_a_bad_filter_says_what_is_wrong_with_it(browser: Browser, address: str) -> None:
    visit(browser, f"{address}?q=moon&where=lagn%3Den")
    assert "'lagn'" in browser.run("document.querySelector('.side .error').textContent")
    browser.run("document.querySelector('#conditions button').click()")
    until(browser)
    assert browser.run("document.querySelectorAll('#open .error').length") == 0 and len(browser.run(HITS)[0]) == 10


def test_no_hit_says_so(browser: Browser, address: str) -> None:
    visit(browser, f"{address}?q=moon&where=lang%3Dxx")
    assert browser.run("document.getElementById('hits').textContent").endswith("No document passes these filters.")


BUSY = """(() => {
  const real = window.fetch, said = '{"error": {"message": "The queue is full."}}';
  const refusal = () => Promise.resolve(new Response(said, {status: 429, headers: {'Retry-After': '1'}}));
  window.asked = 0;
  window.real = real;
  window.fetch = (...how) => window.asked++ < REFUSED ? refusal() : real(...how);
})()"""
ERROR = "document.querySelector('.side .error')"


def test_a_busy_server_is_asked_again(browser: Browser, address: str) -> None:
    visit(browser, address)
    browser.run(BUSY.replace("REFUSED", "1"))
    write(browser, "query", "moon")
    press(browser, "Enter")
    assert browser.run(f"{ERROR}.textContent") == "The queue is full. Asking again in 1 second (1 of 5).Stop"
    until(browser, "document.querySelectorAll('.hit').length === 10")


def test_a_server_that_stays_busy_is_asked_five_times_each_later_and_then_by_hand_alone(
    browser: Browser, address: str
) -> None:
    visit(browser, address)
    browser.run(BUSY.replace("REFUSED", "6"))
    browser.run("""(() => {
      const later = window.setTimeout;
      window.delays = [];
      window.setTimeout = (act, wait) => { window.delays.push(wait); return later(act, 0); };
    })()""")
    write(browser, "query", "moon")
    press(browser, "Enter")
    until(browser, "window.asked === 6 && document.querySelector('.side .error button')?.textContent === 'Try again'")
    assert browser.run("window.delays") == [1000, 2000, 4000, 8000, 16000]
    assert browser.run(f"{ERROR}.textContent") == "The queue is full.Try again"
    browser.run(f"{ERROR}.querySelector('button').click()")
    until(browser, "document.querySelectorAll('.hit').length === 10")


def test_asking_again_can_be_stopped(browser: Browser, address: str) -> None:
    visit(browser, address)
    browser.run(BUSY.replace("REFUSED", "99"))
    browser.run("""(() => {
      window.waiting = new Map();
      window.setTimeout = (act) => { window.waiting.set(window.waiting.size + 1, act); return window.waiting.size; };
      window.clearTimeout = (timer) => window.waiting.delete(timer);
    })()""")
    write(browser, "query", "moon")
    press(browser, "Enter")
    assert browser.run("window.waiting.size") == 1
    browser.run(f"{ERROR}.querySelector('button').click()")
    assert browser.run("window.waiting.size") == 0
    assert browser.run(f"{ERROR}.textContent") == "The queue is full.Try again"


def test_the_key_is_asked_for_and_kept_in_memory(
    browser: Browser, serving: Serving, told: Embedder, index: Index
) -> None:
    with serving(told, index=index, page=True, keys=["right"]) as server:
        browser.open(f"http://127.0.0.1:{server.port}/?q=moon", *DESKTOP, "light")
        until(browser, "!document.getElementById('key-form').hidden")
        write(browser, "key", "wrong")
        press(browser, "Enter")
        until(browser, "Boolean(document.getElementById('key-wrong').textContent)")
        write(browser, "key", "right")
        press(browser, "Enter")
        until(browser, "document.querySelectorAll('.hit').length === 10")
        kept = browser.run("[location.href, document.cookie, localStorage.length + sessionStorage.length]")
        assert "right" not in kept[0] and kept[1:] == ["", 0]
    write(browser, "query", "dog")  # the server has gone
    press(browser, "Enter")
    assert "does not answer" in browser.run("document.querySelector('.side .error').textContent")
    assert browser.run("document.querySelector('.side .error button').textContent") == "Try again"
