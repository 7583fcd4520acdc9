"""The report in headless Chromium: at 1100 and 390 pixels, light and dark; and inside a page of somebody else's."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.report import Section
from runtime.report.render import embed

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium (Debian package chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


class Opened:
    """A page, what it asked the network for, and what it said on the console."""

    def __init__(self, browser: Any, report: Path, width: int, scheme: str) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(report.as_uri())

    def pixels(self, full_page: bool = True) -> Any:
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(full_page=full_page))).convert("RGB"))


SIZES = [(1100, "light"), (1100, "dark"), (390, "light"), (390, "dark")]


@pytest.fixture(scope="module", params=SIZES, ids=lambda p: f"{p[0]}-{p[1]}")
def opened(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Opened]:
    page = Opened(browser, report, *request.param)
    yield page
    page.page.close()


def test_the_page_asks_the_network_for_nothing_and_the_console_is_silent(opened: Opened, report: Path) -> None:
    assert [url for url in opened.requests if not url.startswith("data:")] == [report.as_uri()]
    assert opened.errors == []


def test_nothing_is_wider_than_the_page(opened: Opened) -> None:
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    outside = page.evaluate(
        """() => [...document.querySelectorAll('section *')].filter(e => {
            if (e.closest('.scroll, pre, defs, .defs') || !e.getClientRects().length) return false;
            const box = e.getBoundingClientRect();
            return box.right > document.documentElement.clientWidth + 1 || box.left < -1;
        }).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert outside == []


def test_no_table_is_cut(opened: Opened) -> None:
    cut = opened.page.evaluate(
        """() => [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)
            .map(e => [e.getAttribute('aria-label'), e.scrollWidth, e.clientWidth])"""
    )
    assert cut == []


def test_no_cell_is_printed_over_the_next(opened: Opened) -> None:
    over = opened.page.evaluate(
        """() => [...document.querySelectorAll('th, td')].filter(e => e.getClientRects().length)
            .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"""
    )
    assert over == []


def test_plots_are_drawn_for_the_width_at_hand(opened: Opened) -> None:
    wide, narrow = (opened.page.locator(f"{kind} svg").first.is_visible() for kind in (".wide", ".narrow"))
    assert (wide, narrow) == ((True, False) if opened.page.viewport_size["width"] > 640 else (False, True))
    small = opened.page.evaluate(
        """() => [...document.querySelectorAll('svg text')].filter(t => t.getClientRects().length)
            .map(t => t.getBoundingClientRect()).filter(b => Math.max(b.width, b.height) > 0)
            .map(b => Math.min(b.width, b.height)).filter(h => h < 4).length"""
    )
    assert small == 0, "text of a plot is too small to read"


def test_no_text_of_a_plot_is_cut_off(opened: Opened) -> None:
    cut = opened.page.evaluate(
        """() => [...document.querySelectorAll('.wide text, .narrow text')].filter(t => {
            if (!t.getClientRects().length) return false;
            const box = t.getBoundingClientRect(), frame = t.closest('svg').getBoundingClientRect();
            return box.left < frame.left - 2 || box.right > frame.right + 2
                || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
        }).map(t => t.textContent)"""
    )
    assert cut == []


def test_text_stands_out_from_its_ground_in_light_and_dark(opened: Opened) -> None:
    """WCAG AA: a contrast of 4.5 for text."""
    pairs = opened.page.evaluate(
        """() => {
            const ground = e => { while (e) { const c = getComputedStyle(e).backgroundColor;
                if (c !== 'rgba(0, 0, 0, 0)') return c; e = e.parentElement; } return 'rgb(255, 255, 255)'; };
            const css = '.quiet, p, h1, h2, dt, dd, td, th, figcaption, nav a, .verdict, li, svg text, summary';
            return [...document.querySelectorAll(css)].filter(e => e.getClientRects().length).map(e => {
                const s = getComputedStyle(e);
                return [e instanceof SVGElement ? s.fill : s.color, ground(e), e.textContent.trim().slice(0, 40)]; });
        }"""
    )
    assert len(pairs) > 100
    weak = {(a, b, text) for a, b, text in pairs if contrast(a, b) < 4.5}
    assert weak == set()


def test_dark_is_dark_and_light_is_light(browser: Any, report: Path) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        opened = Opened(browser, report, 1100, scheme)
        grounds[scheme] = luminance(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        pixels = opened.pixels(full_page=False)
        assert (np.median(pixels) > 200) == (scheme == "light")
        opened.page.close()
    assert grounds["light"] > 0.8
    assert grounds["dark"] < 0.05


def test_the_screenshot_has_plots_and_not_only_paper(opened: Opened) -> None:
    pixels = opened.pixels()
    colours = np.unique(pixels[::3, ::3].reshape(-1, 3) // 16, axis=0)
    assert len(colours) > 60, "blank"
    boxes = opened.page.evaluate(
        """() => [...document.querySelectorAll('section')].map(s => {
            const b = s.getBoundingClientRect(); return [b.top, b.bottom, b.left, b.right].map(Math.round); })"""
    )
    for top, bottom, left, right in boxes:
        assert pixels[top:bottom, left:right].std() > 2


def test_every_image_was_decoded(opened: Opened) -> None:
    assert opened.page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


NOTEBOOK = """<!doctype html><title>n</title><style>
  .host table { table-layout: fixed; font-size: 20px; border: 3px solid red } .host td, .host th { max-width: 20px }
  .host tbody tr:nth-child(odd) { background: black } .host section, .host ul { background: black; list-style: square }
</style><body style="margin: 8px"><div class="host"><h2 id="s1">mine</h2>%s%s</div></body>"""


@pytest.fixture(scope="module")
def embedded(every_section: list[Section]) -> str:
    return embed(every_section) or ""


@pytest.mark.parametrize(("width", "theme"), [(1100, "true"), (390, "false")])
def test_an_embedded_report_keeps_its_looks_and_leaves_its_host_alone(
    browser: Any, embedded: str, tmp_path: Path, width: int, theme: str
) -> None:
    page = tmp_path / "notebook.html"
    text = NOTEBOOK.replace("<body", f'<body data-jp-theme-light="{theme}"') % (embedded, embedded)
    page.write_text(text)
    opened = Opened(browser, page, width, "light" if theme == "false" else "dark")
    assert opened.requests == [page.as_uri()] or all(url.startswith("data:") for url in opened.requests[1:])
    assert opened.errors == []
    style = "e => (s => [s.backgroundColor, s.fontSize, s.tableLayout, s.display])(getComputedStyle(e))"
    ground, size, layout, _ = opened.page.locator(".gmconv table").first.evaluate(style)
    assert (ground, size, layout) == ("rgba(0, 0, 0, 0)", "13px", "auto")
    own = opened.page.locator(".gmconv").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert (luminance(own) > 0.8) == (theme == "true")
    assert opened.page.locator("#s1").evaluate("e => getComputedStyle(e).fontSize") == "24px", "the host's own heading"
    assert opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    shown = [opened.page.locator(f".gmconv {kind} svg").first.is_visible() for kind in (".wide", ".narrow")]
    assert shown == [width > 640, width <= 640]
    opened.page.close()


def luminance(colour: str) -> float:
    """WCAG relative luminance of `rgb(r, g, b)`."""
    parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """WCAG contrast ratio of two colours."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
