"""An error of the size of the rounding shows once the activations are not rounded, in 8 bits and in 16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import gmconv
from export.graph.check import save_graph
from export.precision.convert import convert_precision
from export.precision.converter import PrecisionOptions
from runtime.manifest import read_manifest
from runtime.parity.report import ParityReport
from runtime.parity.run import CandidateReport, ParityOptions, compare_artefacts
from runtime.records import UNROUNDED
from runtime.report import Parity, manifest_sections
from runtime.report.sections import LIMIT
from runtime.runners import onnxruntime
from tests.runtime.parity.test_bisect import randomize_norms, save

FORMS = {
    "int8": ("int8", PrecisionOptions(calibration="digits", calibration_images=64)),
    "fp8": ("fp8", PrecisionOptions(calibration="digits", calibration_images=64)),
    "cpu": ("int8", PrecisionOptions(calibration="digits", calibration_images=64, target="cpu")),
    "kept": (
        "int8",
        PrecisionOptions(calibration="digits", calibration_images=64, keep_fp32=("layer2*", "layer3*")),
    ),
    "fp16": ("fp16", PrecisionOptions(keep_fp32=("layer3*",), io_dtype="fp16")),
    "bf16": ("bf16", PrecisionOptions()),
}
pytestmark = pytest.mark.xdist_group("test_unrounded")  # its networks are exported once


def shift_one_kernel(path: Path) -> Path:
    """A copy in which the kernels from half of the channels to one layer in the middle are off by a tap."""
    model = onnx.load(path)
    stored = next(t for t in model.graph.initializer if t.name.startswith("layer2") and len(t.dims) == 4)
    values = numpy_helper.to_array(stored).copy()
    values[:, ::2] = np.roll(values[:, ::2], 1, axis=3)
    stored.CopyFrom(helper.make_tensor(stored.name, stored.data_type, values.shape, values.tobytes(), raw=True))
    wrong = path.with_name(f"wrong.{path.name}")
    save_graph(model, wrong, read_manifest(path))
    return wrong


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CandidateReport]:
    """What parity says of ResNet-8 on digits in each form, and of it with an error."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("unrounded")
    model = randomize_norms(gmconv.models.create("resnet8", sigma=0.9))
    checkpoint, fp32 = save(model, folder, "gmconv.models:resnet8", (3, 16, 16))
    files = []
    for name, (kind, options) in FORMS.items():
        convert_precision(fp32, folder / f"{name}.onnx", kind, options, verify=False)
        files += [folder / f"{name}.onnx", shift_one_kernel(folder / f"{name}.onnx")]
    found = compare_artefacts(checkpoint, files, ParityOptions(samples=16, images="digits")).candidates
    return {candidate.path.stem: candidate for candidate in found}


@pytest.mark.parametrize("form", FORMS)
def test_a_clean_artefact_passes_also_where_layers_were_kept(said: dict[str, CandidateReport], form: str) -> None:
    assert said[form].passed, said[form].failures()
    assert any(hop.name.endswith(UNROUNDED) for hop in said[form].verdict.hops)
    table = repr(ParityReport(reference=Path("net.pt"), engine="torch", candidates=(said[form],)))
    assert all(words in table for words in ("digits, activations", "unrounded", LIMIT.split()[-1]))
    assert "digits  " in table


def test_a_report_says_what_the_limit_is_beside_the_rows(said: dict[str, CandidateReport]) -> None:
    """Which are judged together: their error and the limit do not give the margin."""
    candidate, reference = said["fp16"], Path("net.pt")
    manifest = replace(read_manifest(candidate.path), parity=candidate.record(reference))
    compared = ParityReport(reference=reference, engine="torch", candidates=(candidate,)).sections()
    for sections in (compared, manifest_sections("net.onnx", manifest)):
        assert [section.note for section in sections if isinstance(section, Parity)] == [LIMIT]


@pytest.mark.parametrize("form", FORMS)
def test_the_limit_that_decides_is_the_one_that_is_told(said: dict[str, CandidateReport], form: str) -> None:
    """Found in the clean artefact and broken by the wrong one, where the table's own number would pass both."""
    clean, wrong = (
        [
            hop.outputs[0]
            for hop in said[name].verdict.hops
            if hop.name.endswith(UNROUNDED) and "noise" not in hop.inputs
        ]
        for name in (form, f"wrong.{form}")
    )
    table = said[form].tolerance.rel_rms
    assert all(found.tolerance < table and found.margin is not None and found.margin > 1 for found in clean)
    assert any(found.rel_rms > found.tolerance for found in wrong if found.rel_rms is not None)
    assert all((found.margin is None or found.margin < 1) for found in wrong if not found.passed)
    assert all((found.margin is None or found.margin >= 1) for found in wrong if found.passed)


@pytest.mark.parametrize("form", FORMS)
def test_an_error_that_the_rounding_would_hide_is_refused(said: dict[str, CandidateReport], form: str) -> None:
    assert not said[f"wrong.{form}"].passed
    assert UNROUNDED in " ".join(said[f"wrong.{form}"].failures())


def test_where_it_cannot_run_that_is_said(said: dict[str, CandidateReport], monkeypatch: pytest.MonkeyPatch) -> None:
    path = said["fp16"].path
    assert not any("unrounded" in text for text in said["fp16"].verdict.notes)

    def notes(path: Path) -> list[str]:
        (found,) = compare_artefacts(said["fp16"].path.with_name("net.pt"), [path], ParityOptions(samples=8)).candidates
        assert not any(hop.name.endswith(UNROUNDED) for hop in found.verdict.hops)
        return [text for text in found.verdict.notes if text.startswith("not compared with its activations unrounded")]

    foreign = path.with_name("foreign.onnx")
    foreign.write_bytes(path.read_bytes())
    (note,) = notes(foreign)
    assert note.endswith("errors that rounding hides: how its weights were rounded is not known without a manifest")
    open_bytes = onnxruntime.open_bytes
    monkeypatch.setattr(onnxruntime, "open_bytes", lambda model, path, outputs: open_bytes(model, path, ["no such"]))
    (note,) = notes(path)
    assert "fp16.onnx: cannot be run in parts" in note
    monkeypatch.setattr("runtime.parity.unrounded._widened", lambda graph: b"what ONNX Runtime does not load")
    (note,) = notes(path)
    assert "fp16.onnx: cannot be run in parts" in note
