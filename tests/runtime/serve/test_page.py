"""The page at / in headless Chromium: by mouse, by keyboard, narrow, dark, offline, with a token."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .conftest import LABELS, Server, classifier

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next((p for p in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser")) if p.exists()), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
CERTIFICATE = {
    "layers": [
        {"name": "conv1", "kernel": [5, 5], "sigma": {"min": 1.0, "median": 1.2, "max": 1.5}},
        {"name": "conv2", "kernel": [3, 3], "sigma": {"min": 0.7, "median": 0.7, "max": 0.7}},
    ]
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        running = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def carded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("page")
    classifier(root / "one.onnx", seed=1, certificate=CERTIFICATE, arch="tests:tiny", parity={"passed": True})
    classifier(root / "two.onnx", seed=9)
    running = Server(root)
    yield running
    running.stop()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return path


class Visit:
    """A page that fails the test on any script error, CSP violation or request to elsewhere."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.problems: list[str] = []
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda m: self.problems.append(m.text) if "Security" in m.text else None)
        self.page.on("request", self._check)
        self.home = f"http://{server.http}/"
        self.page.goto(self.home)

    def _check(self, request: Any) -> None:
        if not request.url.startswith((self.home, "blob:", "data:")):
            self.problems.append(f"request to {request.url}")

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: Any, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert self.problems == []


def shown(page: Any) -> list[str]:
    page.wait_for_selector("ol.classes li")
    return page.locator("ol.classes .label").all_inner_texts()


def test_choose_a_file_and_see_classes_times_and_card(browser: Any, carded: Server, picture: Path) -> None:
    with Visit(browser, carded) as page:
        page.wait_for_function("document.querySelector('#status-text').textContent === 'ready'")
        page.set_input_files("#image", str(picture))
        first = shown(page)
        assert sorted(first) == sorted(LABELS)
        shares = [float(t.split()[0]) for t in page.locator("ol.classes .share").all_inner_texts()]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(100, abs=0.5)
        times = dict(row.split("\t") for row in page.locator("#times tr").all_inner_texts())
        assert {"Queue", "Compute", "Server"} <= set(times)
        assert page.locator("#preview").get_attribute("alt") == "The chosen image, picture.png"
        card = page.locator("#card").inner_text()
        assert "tests:tiny" in card
        assert "passed" in card
        assert page.locator("#masks li").count() == 2
        assert page.locator("#masks svg").first.locator("rect").count() == 25
        centre = float(page.locator("#masks svg").first.locator("rect").nth(12).get_attribute("fill-opacity"))
        corner = float(page.locator("#masks svg").first.locator("rect").nth(0).get_attribute("fill-opacity"))
        assert centre == 1
        assert corner == pytest.approx(np.exp(-8 / (2 * 1.2**2)))
        page.select_option("#model", label="two")
        page.wait_for_function("document.querySelectorAll('#masks li').length === 0")


def test_drop_an_image(browser: Any, carded: Server) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 30, 30)).save(stream, "PNG")
    with Visit(browser, carded) as page:
        transfer = page.evaluate_handle(
            """bytes => { const t = new DataTransfer();
            t.items.add(new File([new Uint8Array(bytes)], 'red.png', {type: 'image/png'})); return t; }""",
            list(stream.getvalue()),
        )
        page.wait_for_selector("#model option", state="attached")
        page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
        assert len(shown(page)) == 4


def test_a_file_that_is_no_image_gets_a_sentence(browser: Any, carded: Server, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    with Visit(browser, carded) as page:
        page.wait_for_selector("#model option", state="attached")
        page.set_input_files("#image", str(tmp_path / "text.png"))
        assert "cannot be used" in page.locator("#result .error").inner_text()


def test_keyboard_and_names(browser: Any, carded: Server, picture: Path) -> None:
    with Visit(browser, carded) as page:
        page.wait_for_selector("#model option", state="attached")
        order = []
        for _ in range(5):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert order == ["Skip to the image", "model", "image", "OpenAPI document", "manifest-link"]
        page.focus("#image")
        page.evaluate("document.querySelector('#image').onclick = () => { window.opened = true; return false; }")
        page.keyboard.press("Space")  # on a file input this is a click, which opens the file chooser
        page.wait_for_function("window.opened === true")
        page.set_input_files("#image", str(picture))
        assert len(shown(page)) == 4
        # What a screen reader is given: every control has a name, the result is a live region, headings in order.
        assert page.get_by_label("Model", exact=True).count() == 1
        assert page.get_by_label("Choose another image").count() == 1
        assert page.locator("#result[aria-live=polite]").count() == 1
        assert page.locator("html[lang=en]").count() == 1
        levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_fits_and_has_contrast(browser: Any, carded: Server, picture: Path, width: int, scheme: str) -> None:
    with Visit(browser, carded, viewport={"width": width, "height": 844}, color_scheme=scheme) as page:
        page.set_input_files("#image", str(picture))
        shown(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        pairs = page.evaluate(
            """() => { const s = getComputedStyle(document.documentElement), v = n => s.getPropertyValue(n).trim();
            return ['--ink', '--quiet', '--accent', '--bad'].map(n => [v(n), v('--panel')]); }"""
        )
        for ink, ground in pairs:
            assert contrast(ink, ground) >= 4.5, (ink, ground)


def contrast(a: str, b: str) -> float:
    """WCAG contrast ratio of two hex colours."""

    def luminance(text: str) -> float:
        text = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
        values = [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_asks_for_the_token(browser: Any, start: Callable[..., Server], tmp_path: Path, picture: Path) -> None:
    token = "a-token-of-32-characters-or-more"
    server = start(classifier(tmp_path / "m.onnx"), env={"GMCONV_SERVE_TOKEN": token})
    with Visit(browser, server) as page:
        page.wait_for_selector("#token-form:not([hidden])")
        page.fill("#token", token)
        page.keyboard.press("Enter")
        page.wait_for_selector("#model option", state="attached")
        page.set_input_files("#image", str(picture))
        assert len(shown(page)) == 4
