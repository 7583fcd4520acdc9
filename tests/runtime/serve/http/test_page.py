"""The page at / in headless Chromium: by mouse, by keyboard, narrow, dark, offline, with a token."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from runtime.records import Parity

from ..conftest import IMAGE, LABELS, Server, classifier, write_model

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
CHROMIUM = next((p for p in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser")) if p.exists()), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
Routes = dict[str, Callable[[Any], None]]
"""URL pattern -> what happens to such a request; the tests' way to make an answer late, or a proxy's."""
HOSTILE = "<img src=x onerror=\"document.title='run'\"><b>bold</b>"
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
    classifier(root / "one.onnx", seed=1, certificate=CERTIFICATE, arch="tests:tiny", parity=Parity(reference="net.pt"))
    classifier(root / "two.onnx", seed=9)
    running = Server(root)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Models that are not the plain case, one trait each."""
    root = tmp_path_factory.mktemp("odd")
    classifier(root / "hostile.onnx", labels=(HOSTILE, "long" * 200, *LABELS[2:]), arch=HOSTILE)
    classifier(root / "many" / "1" / "model.onnx", seed=1)
    classifier(root / "many" / "2" / "model.onnx", seed=2)
    classifier(root / "tensors.onnx", preprocessing=None, labels=None)
    classifier(root / "unlabelled.onnx", labels=None, certificate={"layers": CERTIFICATE["layers"][:1]})
    for name, factor in (("nan", np.nan), ("several", 1.0)):
        write_model(
            root / f"{name}.onnx",
            [
                helper.make_node("GlobalAveragePool", ["input"], ["a"]),
                helper.make_node("Flatten", ["a"], ["features"]),
                helper.make_node("Mul", ["features", "factor"], ["logits"]),
            ],
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3]) for n in ("logits", "features")],
            [numpy_helper.from_array(np.array([factor], "f4"), "factor")],
            preprocessing=IMAGE,
        )
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3, 8, 8]) for n in ("input", "logits")]
    node = helper.make_node("Relu", ["input"], ["logits"])
    write_model(root / "mask.onnx", [node], tensors[:1], tensors[1:], preprocessing=IMAGE, labels=LABELS[:3])
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

    def __init__(self, browser: Any, server: Server, routes: Routes | None = None, **options: Any) -> None:
        self.problems: list[str] = []
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda m: self.problems.append(m.text) if "Security" in m.text else None)
        self.page.on("request", self._check)
        self.home = f"http://{server.http}/"
        for pattern, handler in (routes or {}).items():
            self.page.route(pattern, handler)
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
        expect(page.locator("#status-text")).to_have_text("ready")
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
        expect(page.locator("#masks li")).to_have_count(0)


def test_drop_an_image(browser: Any, carded: Server) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 30, 30)).save(stream, "PNG")
    with Visit(browser, carded) as page:
        transfer = page.evaluate_handle(
            """bytes => { const t = new DataTransfer();
            t.items.add(new File([new Uint8Array(bytes)], 'red.png', {type: 'image/png'})); return t; }""",
            list(stream.getvalue()),
        )
        expect(page.locator("#model")).to_be_enabled()
        page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
        assert len(shown(page)) == 4


@pytest.mark.parametrize("target", ["#drop", "h1"])
def test_files_dropped_anywhere_stay_on_the_page(
    browser: Any, carded: Server, picture: Path, tmp_path: Path, target: str
) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    with Visit(browser, carded) as page:
        expect(page.locator("#model")).to_be_enabled()
        drop_files(page, target, [tmp_path / "notes.txt", picture])
        assert len(shown(page)) == 4
        expect(page.locator("#result")).to_contain_text("picture.png is most probably ")
        expect(page.locator("#result")).to_contain_text("2 files came at once; only this one was taken.")
        assert page.locator("#drop.over").count() == 0
        drop_files(page, target, [tmp_path])
        expect(page.locator("#result .error")).to_contain_text(f"{tmp_path.name} cannot be read")
        assert len(page.context.pages) == 1


def drop_files(page: Any, target: str, files: list[Path]) -> None:
    """Drag files from the desktop onto an element, with the browser's own handling of what a page does not prevent."""
    box = page.locator(target).bounding_box()
    devtools = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": box["x"] + 9, "y": box["y"] + 9, "data": data})


def test_too_large_a_file_gets_a_sentence(browser: Any, carded: Server, tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as stream:
        stream.truncate(17 << 20)
    with Visit(browser, carded) as page:
        expect(page.locator("#model")).to_be_enabled()
        page.set_input_files("#image", str(tmp_path / "large.png"))
        expect(page.locator("#result .error")).to_have_text(
            "The request body is larger than 16,777,216 bytes, the most that is taken here."
        )
        assert page.locator("#preview").is_hidden()


def test_names_are_text_however_they_look(browser: Any, odd: Server, picture: Path) -> None:
    with Visit(browser, odd, viewport={"width": 390, "height": 844}) as page:
        page.set_input_files("#image", str(picture))
        assert sorted(shown(page)) == sorted((HOSTILE, "long" * 200, *LABELS[2:]))
        assert page.locator("#card").inner_text().count(HOSTILE) == 1
        assert page.locator("main img:not(#preview), main b").count() == 0
        assert page.title() == "Classify an image"
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_models_that_are_not_the_plain_case(browser: Any, odd: Server, picture: Path) -> None:
    with Visit(browser, odd) as page:
        page.set_input_files("#image", str(picture))
        shown(page)
        result, card = page.locator("#result"), page.locator("#card")
        assert page.locator("#model option").all_inner_texts()[1:3] == ["many, version 2", "many, version 1"]
        page.select_option("#model", label="many, version 1")
        expect(result).to_contain_text("says many, version 1.")
        page.select_option("#model", label="unlabelled")
        expect(result).to_contain_text(re.compile("most probably class [0-3] .* says unlabelled"))
        expect(card).to_contain_text("without names; shown by their index")
        expect(page.locator("#masks-count")).to_have_text("(1 layer)")
        page.select_option("#model", label="several")
        expect(card).to_contain_text("Classes are read fromlogits")
        expect(result).to_contain_text("says several, version 1.")
        page.select_option("#model", label="nan")
        expect(result).to_have_text("For picture.png, nan, version 1 returned no usable scores: none is a number.")
        for name, why in (
            ("tensors", "has no preprocessing in its manifest (export it with --mean and --std)"),
            ("mask", "gives no class scores (its first output, 'logits', is [-1, 3, 8, 8])"),
        ):
            page.select_option("#model", label=name)
            expect(page.locator("#model-note")).to_have_text(
                f"Model '{name}' {why}: send tensors to v2/models/{name}/versions/1/infer."
            )
            assert page.locator("#drop, #result-panel, #skip").filter(visible=True).count() == 0
            expect(page.locator("h1")).to_have_text("A served model")
            expect(card).to_contain_text(f"{name}.onnx")
            assert "Classes" not in card.inner_text()
        page.select_option("#model", label="many, version 2")
        expect(page.locator("#model-note")).to_be_empty()
        expect(result).to_contain_text("says many, version 2.")
        expect(page.locator("h1")).to_have_text("Classify an image")


def test_a_file_that_is_no_image_gets_a_sentence(browser: Any, carded: Server, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    with Visit(browser, carded) as page:
        expect(page.locator("#model")).to_be_enabled()
        page.set_input_files("#image", str(tmp_path / "text.png"))
        assert "not a JPEG, PNG" in page.locator("#result .error").inner_text()


def test_keyboard_and_names(browser: Any, carded: Server, picture: Path) -> None:
    with Visit(browser, carded) as page:
        expect(page.locator("#model")).to_be_enabled()
        order = []
        for _ in range(5):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
            outlined = page.evaluate(
                """() => [document.activeElement, document.activeElement.closest('.drop')]
                .some(e => e && getComputedStyle(e).outlineStyle === 'solid' && +getComputedStyle(e).opacity)"""
            )
            assert outlined, order[-1]
        assert order == ["skip", "model", "image", "openapi-link", "manifest-link"]
        page.focus("#image")
        page.evaluate("document.querySelector('#image').onclick = () => { window.opened = true; return false; }")
        page.keyboard.press("Space")  # on a file input this is a click, which opens the file chooser
        assert page.evaluate("window.opened") is True
        page.set_input_files("#image", str(picture))
        assert len(shown(page)) == 4
        # What a screen reader is given: every control has a name, the result is a live region, headings in order.
        assert page.get_by_label("Model", exact=True).count() == 1
        assert page.get_by_label("Choose another image").count() == 1
        assert page.locator("#result[aria-live=polite]").count() == 1
        expect(page.locator("#result")).to_contain_text("picture.png is most probably ")
        assert page.locator("html[lang=en]").count() == 1
        levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))


def test_fits_and_has_contrast(browser: Any, odd: Server, picture: Path) -> None:
    def look(page: Any, *controls: str) -> None:
        for width, scheme in product((1280, 390, 320), ("light", "dark")):
            page.set_viewport_size({"width": width, "height": 844})
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            state = page.evaluate(TEXT_COLOURS)
            assert len(state) > 15
            for text, ink, ground in state:
                assert contrast(ink, ground) >= 4.5, (text, ink, ground, width, scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            for control in controls:
                edge, panel = page.locator(control).evaluate(
                    "e => [getComputedStyle(e).borderTopColor, getComputedStyle(e.closest('section')).backgroundColor]"
                )
                assert contrast(edge, panel) >= 3, (control, width, scheme)

    with Visit(browser, odd) as page:
        page.set_input_files("#image", str(picture))
        shown(page)
        expect(page.locator("#card-panel")).to_have_attribute("aria-busy", "false")
        look(page)
        page.focus("#image")  # tints the drop zone
        look(page, "#model", "#drop")
        page.select_option("#model", label="tensors")  # a note below the picker, and nothing beside it
        expect(page.locator("#model-note")).to_contain_text("no preprocessing")
        expect(page.locator("#card-panel")).to_have_attribute("aria-busy", "false")
        look(page, "#model")


TEXT_COLOURS = """() => [...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
    && !e.closest('svg, select') && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    let behind = e;
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    return [e.textContent, getComputedStyle(e).color, getComputedStyle(behind).backgroundColor]; })"""
"""[text, its colour, the colour behind it] of everything that shows text."""


def contrast(a: str, b: str) -> float:
    """WCAG contrast ratio of two colours as getComputedStyle gives them, "rgb(r, g, b)"."""

    def luminance(text: str) -> float:
        values = [int(v) / 255 for v in text.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_asks_for_the_token(browser: Any, start: Callable[..., Server], tmp_path: Path, picture: Path) -> None:
    token = "a-token-of-32-characters-or-more"
    server = start(classifier(tmp_path / "m.onnx"), env={"GMCONV_SERVE_TOKEN": token})
    with Visit(browser, server) as page:
        page.wait_for_selector("#token-form:not([hidden])")
        page.set_input_files("#image", str(picture))
        expect(page.locator("#result")).to_contain_text("asks for a bearer token; picture.png will be classified")
        page.fill("#token", "another")
        page.keyboard.press("Enter")
        expect(page.locator("#token-note")).to_have_text("The server did not accept this token.")
        page.fill("#token", token)
        page.keyboard.press("Enter")
        assert len(shown(page)) == 4
        assert page.locator("#token-form").is_hidden()
        assert page.locator(".error:visible").count() == 0
        # A browser sends no Authorization header when it follows a link.
        for link, content in (("#manifest-link", "gmconv-deploy.manifest/v2"), ("#openapi-link", '"openapi"')):
            expect(page.locator(link)).to_have_attribute("href", re.compile("^blob:"))
            with page.expect_popup() as opened:
                page.click(link)
            expect(opened.value.locator("body")).to_contain_text(content)


def test_opened_before_the_models_are_loaded(browser: Any, carded: Server, picture: Path) -> None:
    loaded = False

    def while_loading(status: int, body: str) -> Callable[[Any], None]:
        return lambda route: route.continue_() if loaded else route.fulfill(status=status, body=body)

    some = '{"models":[{"name":"two","versions":["1"]}]}'  # the others are being loaded
    routes = {"**/v2/health/ready": while_loading(503, ""), "**/v2/models": while_loading(200, some)}
    with Visit(browser, carded, routes) as page:
        expect(page.locator("#status-text")).to_have_text("loading the models")
        expect(page.locator("#model")).to_be_disabled()
        page.set_input_files("#image", str(picture))
        expect(page.locator("#result")).to_have_text(
            "The models are still loading; picture.png will be classified after that."
        )
        loaded = True
        assert len(shown(page)) == 4
        expect(page.locator("#status-text")).to_have_text("ready")
        assert page.locator("#model option").all_inner_texts() == ["one", "two"]
        assert page.locator("#model option:checked").inner_text() == "one"
        assert page.locator("#masks li").count() == 2


def test_the_picker_follows_the_server(browser: Any, carded: Server, picture: Path) -> None:
    models = ["one", "two"]

    def listed(route: Any) -> None:
        route.fulfill(json={"models": [{"name": name, "versions": ["1"]} for name in models]})

    with Visit(browser, carded, {"**/v2/models": listed}) as page:
        page.clock.install()
        page.reload()
        page.set_input_files("#image", str(picture))
        expect(page.locator("#result")).to_contain_text("says one, version 1.")
        page.select_option("#model", label="two")
        expect(page.locator("#result")).to_contain_text("says two, version 1.")
        page.evaluate(COUNT_CHANGES, "#status")
        models.insert(0, "new")
        page.clock.run_for(6000)
        expect(page.locator("#model option")).to_have_count(3)
        assert page.locator("#model option:checked").inner_text() == "two"
        models[:] = ["one"]
        page.clock.run_for(6000)
        expect(page.locator("#result")).to_contain_text("says one, version 1.")
        expect(page.locator("#masks li")).to_have_count(2)
        assert page.evaluate("window.changes") == []  # what has not changed is not announced again
        models.clear()
        page.clock.run_for(6000)
        expect(page.locator("#model")).to_be_disabled()
        expect(page.locator("#card")).to_have_text("Modelnone yet")


COUNT_CHANGES = """selector => { window.changes = []; new MutationObserver(() =>
    window.changes.push(document.querySelector(selector).textContent)).observe(
    document.querySelector(selector), {subtree: true, childList: true, characterData: true}); }"""
"""What a screen reader would announce of a live region, from now on, in `window.changes`."""


def test_only_the_model_chosen_last_is_shown(browser: Any, carded: Server, picture: Path) -> None:
    held: list[Any] = []
    with Visit(browser, carded) as page:
        page.set_input_files("#image", str(picture))
        shown(page)
        page.select_option("#model", label="two")
        expect(page.locator("#result")).to_contain_text("says two, version 1.")
        page.route("**/v2/models/one/**", lambda route: held.append(route))
        page.select_option("#model", label="one")
        expect(page.locator("#card-panel")).to_have_attribute("aria-busy", "true")
        page.select_option("#model", label="two")
        expect(page.locator("#result")).to_contain_text("says two, version 1.")
        assert len(held) == 2
        for late in held:
            late.continue_()
        page.wait_for_timeout(300)  # nothing is to be seen of the late answers, so there is nothing else to wait for
        assert "says two, version 1." in page.locator("#result").inner_text()
        assert page.locator("#masks li").count() == 0
        assert page.locator("#card dt", has_text="Artefact").count() == 1
        for panel in ("#card-panel", "#result-panel"):
            expect(page.locator(panel)).to_have_attribute("aria-busy", "false")


def test_old_classes_are_gone_while_the_next_image_is_classified(browser: Any, carded: Server, picture: Path) -> None:
    held: list[Any] = []
    second = picture.rename(picture.with_name("second.png"))
    with Visit(browser, carded) as page:
        page.set_input_files("#image", str(second))
        shown(page)
        height = page.locator("#result-panel").bounding_box()["height"]
        page.route("**/classify?*", lambda route: held.append(route))
        page.evaluate(COUNT_CHANGES, "#result")
        page.set_input_files("#image", str(second))
        expect(page.locator("#result")).to_have_text("Classifying second.png…")
        assert page.locator("#result-panel").get_attribute("aria-busy") == "true"
        assert page.locator("ol.classes li").count() == 0
        assert page.locator("#latency").is_hidden()
        assert page.locator("#result-panel").bounding_box()["height"] == height  # nothing below jumps
        held[0].continue_()
        shown(page)
        assert page.locator("#result-panel").get_attribute("aria-busy") == "false"
        assert len(page.evaluate("window.changes")) == 2
        assert page.evaluate("window.changes")[1].startswith("second.png is most probably ")


FAILURES: list[tuple[dict[str, Any] | None, str]] = [
    (
        {"status": 503, "json": {"error": "the queue is full"}, "headers": {"Retry-After": "2"}},
        "The queue is full. Try again in 2 seconds.",
    ),
    ({"status": 502, "body": "<html>Bad Gateway</html>"}, "The server answered with status 502 and did not say why."),
    ({"status": 500, "body": ""}, "The server answered with status 500 and did not say why."),
    ({"status": 200, "body": ""}, "The server's answer is not JSON and could not be read."),
    ({"status": 500, "body": "null"}, "The server answered with status 500 and did not say why."),
    ({"status": 200, "body": "[]"}, "The server's answer could not be understood."),
    (None, "The server cannot be reached, or it broke off the connection."),
]


def test_every_failure_is_one_sentence(browser: Any, carded: Server, picture: Path) -> None:
    answer: dict[str, Any] | None = None
    routes: Routes = {"**/classify?*": lambda route: route.fulfill(**answer) if answer else route.abort()}
    with Visit(browser, carded, routes) as page:
        for answer, sentence in FAILURES:  # noqa: B007 (the route reads it)
            page.set_input_files("#image", str(picture))
            expect(page.locator("#result .error")).to_have_text(sentence)
            assert page.locator("ol.classes li").count() == 0
            assert page.locator("#latency").is_hidden()
