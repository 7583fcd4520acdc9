"""What an export refuses before it works, and how its files are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from export.onnx import pipeline
from export.onnx.options import ExportOptions
from export.onnx.pipeline import export_onnx
from export.onnx.refusals import advice_on_parity, last_words
from export.onnx.trained import Live
from export.precision.converter import Precision, PrecisionOptions
from gmconv.errors import RefusedError
from gmconv.foreign import NOTHING, OTHERWISE


@pytest.mark.parametrize(
    ("precisions", "names"),
    [
        (("fp32",), ["net.onnx"]),
        (("int8",), ["net.onnx"]),
        (("fp32", "int8"), ["net.onnx", "net.int8.onnx"]),
        (("int8", "fp32"), ["net.int8.onnx", "net.onnx"]),
        (("fp16", "int8"), ["net.fp16.onnx", "net.int8.onnx"]),
    ],
)
def test_a_precision_has_one_name(precisions: tuple[Precision, ...], names: list[str]) -> None:
    assert [file.name for file in ExportOptions(precisions=precisions).outputs(Path("net.onnx"))] == names


def test_golden_pairs_that_held_confirm_what_a_checkpoint_only_assumes() -> None:
    warnings = ("assumed: the sigma of 3 layers is GMConv2d's; give --golden", "weights taken from 'a'; also 'b'")
    assert ExportOptions().confirmed(warnings) == ((), warnings)
    confirmed = ("confirmed by pairs.npz: the sigma of 3 layers is GMConv2d's", "weights taken from 'a'")
    assert ExportOptions(golden=Path("own/pairs.npz")).confirmed(warnings) == (confirmed, ())
    other = f"{OTHERWISE}mean 0.5 (not 0)"
    found = ExportOptions(golden=Path("own/pairs.npz")).confirmed((*warnings, other))
    assert found == (confirmed, (other,)), "they begin where images are prepared"


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Live:
    """A network in memory, in a program where no export may begin to work."""
    monkeypatch.setattr(pipeline, "_write_fp32", lambda *_: pytest.fail("work was done before the refusal"))
    return Live(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval(), torch.randn(2, 3, 8, 8), NOTHING)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ExportOptions(precisions=("fp32", "int8")), "need calibration images: give data="),
        (ExportOptions(precisions=("bf16",), precision=PrecisionOptions(io_dtype="fp16")), "does not go with bf16"),
        (ExportOptions(images=Path("nowhere")), "no such data"),
        (ExportOptions(precisions=("int8",), images="nothing.npz"), "no such file"),
    ],
)
def test_flags_and_headers_are_refused_before_the_work(
    options: ExportOptions, words: str, idle: Live, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=words):
        export_onnx(idle, tmp_path / "net.onnx", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["net.pt", "link.onnx"])
def test_the_checkpoint_is_not_overwritten_under_any_name(taken: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "net.pt")
    (tmp_path / "link.onnx").symlink_to("net.pt")
    with pytest.raises(RefusedError, match=f"{taken}: is an input of this command"):
        export_onnx(tmp_path / "net.pt", tmp_path / taken)


def test_the_advice_about_parity_is_what_there_is_left_to_do() -> None:
    assert advice_on_parity("fp16", ExportOptions(precisions=("fp16",))).startswith("keep the layers")
    several = ExportOptions(precisions=("fp32", "fp16"))
    assert advice_on_parity("fp16", several).startswith("leave fp16 out of --precision to have the others, or keep the")


def test_of_what_the_exporter_printed_the_end_is_shown() -> None:
    noise = "W1 _registration.py:107] torchvision is not installed. Skipping torchvision::nms\n"
    printed = noise * 4 + "".join(f"line {n} {'x' * 999}\n\n" for n in range(80)) + noise
    heading, *lines = last_words(printed).splitlines()
    assert "-v" in heading
    assert [line[:7] for line in lines] == [f"line {n}" for n in range(65, 80)]
    assert max(map(len, lines)) < 220
    assert last_words(noise) == ""
