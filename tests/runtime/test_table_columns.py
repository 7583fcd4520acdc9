"""Which columns of the commands' tables a narrow terminal keeps: those that tell rows apart, then the verdict."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from export.onnx.tables import parity_table
from gmconv.tables import Table
from runtime.benchmark.comparison import Comparison, Row
from runtime.benchmark.interleave import Interleaved, Ratio
from runtime.evaluate.accuracy import Score, Share
from runtime.evaluate.report import ArtefactScore, Evaluation
from runtime.parity.report import CandidateReport, ParityReport
from runtime.parity.tolerances import tolerance_for
from runtime.parity.verdict import Verdict
from runtime.records import UNROUNDED, Hop, OutputComparison, Parity
from runtime.report import sections

WIDTHS = [40, 60, 70, 80, 100, 160]
INPUTS, BATCHES = ("noise, seed 0", "held-out digits"), (1, 2, 17)


def shown(table: Table | Comparison | Evaluation | ParityReport, width: int) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    table.show(console) if not isinstance(table, Table) else console.print(table)
    return stream.getvalue()


def hops(*names: str) -> tuple[Hop, ...]:
    found = OutputComparison(
        output="logits", samples=8, passed=True, precision="int8", tolerance=0.2, margin=8.7, max_abs=0.31,
        mean_abs=0.012, rel_rms=0.023, snr_db=32.8, cosine=0.9997, top1=0.984, top5=1.0,
    )  # fmt: skip
    return tuple(
        Hop(name=name, reference="r", candidate="c", inputs=inputs, shapes={"x": (n, 3, 32, 32)}, outputs=(found,))
        for name in names
        for inputs in INPUTS
        for n in BATCHES
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_no_two_comparisons_of_a_proof_look_alike(width: int) -> None:
    names = ("live -> baked", "baked -> ORT int8", f"baked -> ORT int8{UNROUNDED}")
    text = shown(parity_table(Parity(hops=hops(*names))), width)
    words = [word for inputs in INPUTS for word in inputs.split()]  # folded between them, never broken
    for told in (*(words if width > 40 else ()), *(f"{n}x3x32x32" for n in BATCHES), "2.3e-02", "8.7x", "ok"):
        assert text.count(told) >= 6, told
    assert width > 40 or "not shown at this width: inputs" in text
    assert width < 70 or text.count("2.0e-01") == 12
    assert width < 90 or text.count("98.4%") == 18


@pytest.mark.parametrize("width", WIDTHS)
def test_no_two_cases_of_a_candidate_look_alike(width: int, tmp_path: Path) -> None:
    (file := tmp_path / "net.int8.onnx").write_bytes(b"\x08\x0a")
    candidate = CandidateReport(
        path=file, engine="onnxruntime cpu", precision="int8", tolerance=tolerance_for("int8"),
        verdict=Verdict(hops("r -> c", f"r -> c{UNROUNDED}")), bisection=None, seconds=1.0,
    )  # fmt: skip
    report = ParityReport(reference=Path("net.pt"), engine="torch", candidates=(candidate,))
    text = shown(report, width)
    for batch in BATCHES:
        assert text.count(f"{batch}x3x32x32") >= 4
    assert text.count("8.7x") >= 12
    assert width < 60 or text.count("2.0e-01") >= 12  # the margin's tolerance goes after all that decides nothing
    assert width < 80 or text.count("98.4%") == 12
    (drawn,) = (section for section in report.sections() if isinstance(section, sections.Parity))
    facts = next(section for section in report.sections() if isinstance(section, sections.Facts))
    assert facts.rows["Samples"] == str(8 * len(INPUTS) * len(BATCHES)), "each once, though it went through two hops"
    assert len({(row.case, row.shape) for row in drawn.rows}) == len(drawn.rows) == 12


@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("labels", [True, False])
def test_an_evaluation_keeps_what_was_found(width: int, labels: bool) -> None:
    known = Share(351, 360)
    score = Score(
        samples=360, top1=known if labels else None, top5=None, agreement=Share(359, 360), snr_db=32.8, confusions=()
    )
    rows = tuple(
        ArtefactScore(artefact=name, precision="int8", runner="onnxruntime", mode=mode, score=score)
        for name, mode in (("digits.int8.onnx", ""), ("digits.int8.onnx", "as written"))
    )
    text = shown(Evaluation(reference="digits.pt", images="digits", part="all", samples=360, rows=rows), width)
    assert text.count((known if labels else score.agreement).shown()) == 2
    if labels and width == 80:
        assert text.count(score.agreement.shown()) == 2
        assert "top-5" not in text.partition("not shown")[0]  # nothing was found there


@pytest.mark.parametrize("width", WIDTHS)
def test_a_ratio_keeps_what_it_is_to_where_that_differs(width: int) -> None:
    latency, ratio = {"median": 1.234, "p99": 2.345}, Ratio(1.1, 1.05, 1.15)
    named = (("torch live", "torch twin (no masks)"), ("digits.onnx", "twin of digits.onnx"))
    rows = tuple(Row(name, "onnxruntime cpu", to, {}, latency, ratio, ratio) for name, to in named)
    done = Comparison(rows, Interleaved((), np.ones((2, 20))), {}, ())
    text = shown(done, width)
    told = ("torch live", "masks)", "digits", "1.10") if width == 40 else ("(no masks)", "twin of digits.onnx", "1.10")
    assert all(word in text for word in told)
