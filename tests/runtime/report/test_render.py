import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from export.precision.audit import LayerAudit
from gmconv import gaussian_mask
from gmconv.errors import RefusedError, UnavailableError
from runtime import records
from runtime.manifest import FileDigest, Manifest, TensorSpec, utc_now
from runtime.report import (
    Crop,
    Facts,
    Latency,
    LatencyRun,
    Masks,
    Network,
    Parity,
    ParityRow,
    RatioRow,
    Section,
    TailAudit,
    manifest_sections,
    without_repeated_masks,
    write_report,
)
from runtime.report.blocks import energy_radius, mask_values, radial_profile
from runtime.report.plots import _rows, image, latency, parity
from runtime.report.render import embed, render
from tests.runtime.report.conftest import crop_layer, crop_of, mask_layer


class Page(HTMLParser):
    """Every tag, attribute and id of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text())


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    assert "script" not in page.tags
    assert "iframe" not in page.tags
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            assert value.startswith(("#", "data:")), (name, value)
        assert "url(http" not in value


def test_no_name_of_a_layer_becomes_markup(page: Page) -> None:
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "example.com" not in " ".join(v for n, v in page.attributes if n in ("src", "href"))


def test_ids_are_unique_and_every_reference_has_its_target(report: Path, page: Page) -> None:
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', report.read_text())
    assert set(used) <= set(ids)


def test_colours_of_plots_are_variables_of_the_style_sheet(report: Path) -> None:
    text = report.read_text()
    assert not re.search(r"#0102[0-9a-f]{2}\b", text), "a stand-in colour was left"
    defined = set(re.findall(r"(--[a-z0-9-]+):", text))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", text)) <= defined


def test_numbers_and_verdicts_are_in_the_text(report: Path) -> None:
    text = report.read_text()
    for words in ("error / RMS is too large", "7×7 → 3×3", "FAILED", "PASSED", "66.7×", "0.480 … 0.520"):
        assert words in text


def test_each_cropped_layer_says_its_bound_and_what_was_measured(report: Path) -> None:
    first, second = re.findall(r"<figcaption><b>conv\d</b>[37]×[37] → 3×3(.*?)</figcaption>", report.read_text())
    assert "<br>error ≤ 0.003, data<br>measured 0.0002<br>error / RMS 0.0001<br>" in first
    assert "error" not in second


def test_a_crop_says_what_was_asked_and_what_came_of_it(report: Path) -> None:
    text = report.read_text()
    for words in (
        "0.35 of 0.5 points of top-1, by labels",
        "25,000,000 → 1,000,000 (4.0%)",
        "0.19 RMS, 0.71 largest",
        "99.51% of 1437 samples",
        "1437 of digits, seed 0",
        "stem",
        "conv9",
        "L1 gone 0.07 %",
    ):
        assert words in text


def test_a_crop_of_nothing_shows_kernels_and_no_errors() -> None:
    layer = crop_layer("conv1", 3, 3)
    text = render("Whole", [Crop(crop=crop_of({"tolerance": "lossless", "layers": [layer]}))])
    assert "0 of 1" in text
    assert "hatched taps were removed" not in text
    assert "L1 gone" not in text


def test_baking_is_bitwise_and_has_no_margin(report: Path) -> None:
    rows = re.findall(r"<tr>.*?</tr>", report.read_text(), re.DOTALL)
    (row,) = (row for row in rows if "live -&gt; baked" in row)
    assert re.findall(r">(bitwise|equal)</td>", row) == ["bitwise", "equal"]


def test_sections_name_their_artefact_where_there_are_several() -> None:
    layers = [mask_layer("conv1", 7, 1.2)]
    ends = {"name": "live -> baked", "reference": "live", "candidate": "baked"}
    hop = records.Hop(**ends, inputs="noise", bitwise=False, outputs=(OUTPUT,))
    manifest = Manifest(
        artefact=FileDigest("onnx", "a.onnx", "0" * 64, 1),
        inputs=(),
        outputs=(),
        certificate={"layers": layers},
        crop=crop_of({"tolerance": 1e-3, "layers": [crop_layer("conv1", 7, 3)]}),
        parity=records.Parity(hops=(hop,)),
    )
    told = [s for name in ("a.onnx", "b.onnx") for s in manifest_sections(name, manifest, alone=False)]
    kept = without_repeated_masks(told)
    assert [s.title for s in kept if not isinstance(s, Network)] == [
        "Parity, as proven at export: a.onnx",
        "Masks: a.onnx",
        "Crop: a.onnx",
        "Parity, as proven at export: b.onnx",
        "Crop: b.onnx",
    ]
    (first, *_) = (s for s in kept if isinstance(s, Parity))
    assert first.rows[0].bitwise
    assert not first.rows[0].passed, "the tolerance held, the bits did not"


OUTPUT = records.OutputComparison(output="logits", samples=8, passed=True, tolerance=2e-5, rel_rms=1e-7, margin=200.0)


def test_a_layer_of_several_sigmas_is_a_histogram_and_one_of_a_single_sigma_a_dot() -> None:
    one = mask_layer("conv", 3, 1.0) | {"sigma": {"min": 1.0, "median": 1.0, "max": 1.0}}
    many = mask_layer("conv", 3, 1.0)
    dot, histogram = (render("t", [Masks(certificate={"layers": [layer]})]).count("-patch_") for layer in (one, many))
    assert histogram == dot + 2  # drawn wide and narrow


def test_a_notebook_shows_the_text_where_the_plotting_libraries_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert embed([Facts(rows={"a": "b"})]) is not None
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert embed([Facts(rows={"a": "b"})]) is None


def test_each_layer_says_its_work_and_time_before_and_after_the_crop(report: Path) -> None:
    captions = re.findall(r"<figcaption><b>(conv\d)</b>(7×7 → 3×3|3×3 → 3×3)(.*?)</figcaption>", report.read_text())
    first, second = (caption for _, _, caption in captions)
    assert "49 → 9 M MACs<br>0.52 → 0.21 ms" in first
    assert "<br>9 M MACs" in second
    assert " ms" not in second


def test_removed_taps_are_hatched_and_kept_ones_are_not(report: Path) -> None:
    tile = re.search(r"<svg[^>]*Kernel of conv1: .*?</svg>", report.read_text(), re.DOTALL)
    assert tile
    hatched = {(int(y), int(x)) for x, y in re.findall(r'<rect x="(\d)" y="(\d)"', tile[0])}
    assert hatched == {(r, c) for r in range(7) for c in range(7) if not (2 <= r <= 4 and 2 <= c <= 4)}


@pytest.mark.parametrize(("kernel", "sigma"), [((3, 3), 5.0), ((7, 7), 1.3), ((4, 6), 0.7), ((5, 5), 0.0)])
def test_a_drawn_mask_is_the_layers_mask(kernel: tuple[int, int], sigma: float) -> None:
    wanted = gaussian_mask(kernel, float(sigma)).double().numpy()
    np.testing.assert_allclose(mask_values(kernel, sigma), wanted, rtol=1e-5, atol=1e-7)


def test_kernels_of_ones_own_are_drawn_and_described(report: Path) -> None:
    text = report.read_text()
    assert len(re.findall(r'alt="Kernel of', text)) == 2, "one that was kept has nothing to draw"
    for said in ("σ 1.2 (1.1–1.4) × flat", "centre +0.50, +0.50", "31 % energy gone", "from a.weight, a.sigma"):
        assert said in text
    assert "its kernel is computed from the network" in text


def test_a_heat_map_has_one_pixel_per_value() -> None:
    from PIL import Image

    uri = image(np.array([[0.0, 0.5, 1.0], [1.0, 1.0, 2.0]]), 0, 1)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))
    assert picture.shape == (2, 3, 3)
    assert (picture[0, 2] == picture[1, 2]).all(), "values above the scale are its end"
    assert (picture[0, 0] != picture[0, 1]).any()


def test_a_profile_and_a_radius_of_a_known_map() -> None:
    rows, columns = np.mgrid[0:41, 0:41] - 20
    distance = np.hypot(rows, columns)
    disc = (distance <= 10).astype(float)
    profile = radial_profile(disc)
    assert (profile[:10] == 1).all()
    assert profile[12] == 0
    assert energy_radius(disc, 1.0) == pytest.approx(10)
    assert energy_radius(disc, 0.5) == pytest.approx(10 / 2**0.5, abs=0.5)


def test_a_manifest_tells_what_it_has() -> None:
    plain = Manifest(
        artefact=FileDigest("onnx", "m.onnx", "0" * 64, 1),
        inputs=(TensorSpec("input", "float32", (1, 3, 8, 8)),),
        outputs=(TensorSpec("logits", "float32", (1, 10)),),
    )
    assert [type(s).__name__ for s in manifest_sections("m.onnx", plain)] == ["Network"]


def test_a_converted_graphs_manifest_shows_what_became_of_its_tails() -> None:
    """Layers as `LayerAudit.to_dict()` writes them: pointwise ones have no radius, exact ones no SNR."""
    audit = [
        LayerAudit("conv1", "int8", 2352, 310, 12, 3.61, 2.24, 41.3),
        LayerAudit("fc", "fp32", 640, 0, 0, None, None, None),
    ]
    manifest = Manifest(
        artefact=FileDigest("onnx", "m.int8.onnx", "0" * 64, 1),
        inputs=(TensorSpec("input", "float32", (1, 3, 8, 8)),),
        outputs=(TensorSpec("logits", "float32", (1, 10)),),
        precision="int8",
        certificate={"precision": {"precision": "int8", "layers": [layer.to_dict() for layer in audit]}},
    )
    (section,) = (s for s in manifest_sections("m.int8.onnx", manifest) if isinstance(s, TailAudit))
    text = render("t", [section])
    assert "Kernel tails at this precision" in text
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", text, re.DOTALL)]
    assert rows[0] == ["layer", "precision", "weights", "zeroed", "dead taps", "radius before", "after", "SNR [dB]"]
    assert rows[1] == ["conv1", "int8", "2,352", "310", "12", "3.61", "2.24", "41.3"]
    assert rows[2] == ["fc", "fp32", "640", "0", "0", "–", "–", "exact"]


def test_an_empty_parity_section_has_not_passed() -> None:
    text = render("t", [Parity(reference="a", candidate="b", rows=[])])
    assert 'verdict bad">FAILED' in text


def test_one_report_is_the_same_text_twice_but_for_the_time(
    every_section: list[Section], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.report.render.utc_now", lambda: "2026-01-01T00:00:00+00:00")

    def stripped() -> str:
        return re.sub(r"\bp[0-9a-f]+-\d+-", "", render("t", every_section[:4]))

    assert stripped() == stripped()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="cannot be written"):
        write_report(tmp_path / "no" / "report.html", "t", [Facts(rows={})])
    with pytest.raises(UnavailableError, match="No space left"):
        write_report(Path("/dev/full"), "t", [Facts(rows={})])


def test_several_reports_in_a_folder_have_an_index_and_one_has_none(tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", "First <b>", [Facts(rows={}, passed=True), Facts(rows={}, passed=False)])
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]
    ratios = [RatioRow(name=f"<{n}>", reference="b", value=n, low=n - 0.1, high=n + 0.1) for n in (0.5, 0.25)]
    runs = [LatencyRun(name="b", runner="cpu", latencies=np.array([1.0, 2.0, 4.0]))]
    write_report(tmp_path / "b c.html", "Second", [Facts(rows={}), Latency(runs=runs, ratios=ratios)])
    write_report(tmp_path / "d.html", "Third", [Latency(runs=runs)])
    judged = [Facts(rows={}, passed=True, said="x holds"), Facts(rows={}, passed=False, said="y is <far>")]
    write_report(tmp_path / "e.html", "Fourth", [*judged, Latency(runs=runs)])
    index = (tmp_path / "index.html").read_text()
    assert '<a href="a.html">First &lt;b&gt;</a>' in index
    assert '<a href="b%20c.html">Second</a>' in index
    assert f"<p>FAILED, {utc_now()[:4]}-" in index
    assert "<p>&lt;0.25&gt;: 0.25 [0.15, 0.35] times the latency of b, " in index
    assert "<p>median 2 ms, " in index
    assert "<p>FAILED y is &lt;far&gt;, 2" in index
    for other in ("somebody else's", (tmp_path / "a.html").read_text()):
        (tmp_path / "index.html").write_text(other)
        write_report(tmp_path / "a.html", "First", [Facts(rows={})])
        assert (tmp_path / "index.html").read_text() == other


def test_a_row_without_a_number_can_be_drawn() -> None:
    row = ParityRow(case="nan", output="logits", passed=False, tolerance=1e-5, rel_rms=None, reason="NaN on both sides")
    assert "NaN on both sides" in render("t", [Parity(reference="a", candidate="b", rows=[row])])


def test_something_else_is_no_section() -> None:
    with pytest.raises(TypeError, match="no section"):
        render("t", ["text"])  # type: ignore[list-item]


def test_rows_that_end_alike_are_told_apart() -> None:
    hops = ("live -> baked", "baked -> ORT")
    names = [f"{hop}, noise, seed 0 {batch}x3x224x224" for hop in hops for batch in (1, 2, 17)]
    axes = Figure().add_subplot()
    _rows(axes, names, narrow=True)
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(shown)) == len(names)
    assert [text[-2:] for text in shown[:3]] == [" 1", " 2", "17"], "which batch it is, and no number of a row"


@pytest.mark.parametrize(("fastest", "ratio"), [(0.22, 4.2), (0.11, 9.0), (1.1, 30.0), (3.0, 110.0), (0.001, 1e4)])
def test_an_axis_of_latencies_far_apart_can_be_read_as_a_scale(fastest: float, ratio: float) -> None:
    medians = (fastest, fastest * ratio)
    runs = [LatencyRun(name="", runner="", latencies=median * np.linspace(0.99, 1.01, 9)) for median in medians]
    wide, narrow = latency(runs).split("<svg")[1:]
    for svg in (wide, narrow):
        assert 2 <= len(re.findall(r'id="[^"]*-xtick_\d+"', svg)) <= 7


@pytest.mark.parametrize(
    ("error", "tolerance"), [(5e-3, 5e-3), (1.2e-5, 2e-5), (3e-3, 8e-3), (0.011, 0.04), (2e-3, 0.02), (0.0, 2e-5)]
)
def test_an_error_near_its_tolerance_can_be_read_as_a_number(error: float, tolerance: float) -> None:
    row = ParityRow(case="random", output="logits", passed=True, tolerance=tolerance, rel_rms=error)
    wide, narrow = parity([row]).split("<svg")[1:]
    for svg in (wide, narrow):
        assert 2 <= len(re.findall(r'id="[^"]*-xtick_\d+"', svg)) <= 7
