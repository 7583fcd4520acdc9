"""What an export refuses before it works, and how its files are called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from export.onnx import pipeline
from export.onnx.options import ExportOptions
from export.onnx.pipeline import export_onnx
from export.onnx.refusals import advice_on_parity, last_words, refuse_saying_less
from export.onnx.trained import Live
from export.precision.converter import Precision, PrecisionOptions
from gmconv import Checkpoint
from gmconv.errors import RefusedError
from gmconv.foreign import NOTHING, OTHERWISE, Foreign
from gmconv.preprocessing import Preprocessing
from runtime.manifest import FileDigest, Manifest, digest, sidecar
from runtime.records import Export


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
        (ExportOptions(precision=PrecisionOptions(keep_fp32=("no*",))), "^keep_fp32: without a lower precision every"),
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
    assert advice_on_parity("int8", ExportOptions(precisions=("int8",))).startswith("try another --calibration-method")
    several = ExportOptions(precisions=("fp32", "fp16"))
    assert advice_on_parity("fp16", several).startswith("leave fp16 out of --precision to have the others, or keep the")


def test_of_several_precisions_one_that_is_refused_says_what_became_of_the_others(tmp_path: Path) -> None:
    network = nn.Conv2d(3, 4, 3)
    nn.init.constant_(network.weight, 1e6)
    live = Live(network.eval(), torch.randn(2, 3, 8, 8), NOTHING)
    with pytest.raises(RefusedError, match="fp16.*; nothing was written: leave fp16 out of precision to have the oth"):
        export_onnx(live, tmp_path / "net.onnx", ExportOptions(precisions=("fp32", "fp16")))
    with pytest.raises(RefusedError) as refused:
        export_onnx(live, tmp_path / "net.onnx", ExportOptions(precisions=("fp16",)))
    assert "nothing was written" not in refused.value.message
    assert not list(tmp_path.iterdir())


def test_of_what_the_exporter_printed_the_end_is_shown() -> None:
    noise = "W1 _registration.py:107] torchvision is not installed. Skipping torchvision::nms\n"
    printed = noise * 4 + "".join(f"line {n} {'x' * 999}\n\n" for n in range(80)) + noise
    heading, *lines = last_words(printed).splitlines()
    assert "-v" in heading
    assert [line[:7] for line in lines] == [f"line {n}" for n in range(65, 80)]
    assert max(map(len, lines)) < 220
    assert last_words(noise) == ""


def test_a_file_that_says_more_of_the_same_network_is_not_replaced_unasked(tmp_path: Path) -> None:
    file, source = tmp_path / "net.onnx", FileDigest("checkpoint", "net.pt", "a" * 64, 1)
    file.write_bytes(b"graph")
    preprocessing = {"size": (8, 8), "mean": (0.5,), "std": (0.5,), "channel_order": "L"}
    known = {"labels": ("cat", "dog"), "preprocessing": Preprocessing(**preprocessing), "chain": (source,)}  # type: ignore[arg-type]
    manifest = Manifest(artefact=digest(file, "onnx"), inputs=(), outputs=(), **known)  # type: ignore[arg-type]
    sidecar(file).write_text(replace(manifest, export=Export(opset=20, dynamic_hw=True)).to_json())
    network = Checkpoint(
        model=nn.Identity(), arch="net", arch_kwargs={}, input_shape=(1, 8, 8), inputs=(), masked={}, sha256="a" * 64
    )
    retrained = replace(source, sha256="b" * 64)

    def refuse(given: Foreign, chain: FileDigest = source, loaded: Checkpoint = network, **options: Any) -> None:
        refuse_saying_less(loaded, given, [chain], [file], ExportOptions(**options))

    for chain in (source, retrained):
        with pytest.raises(RefusedError, match=r"is there with labels .* and preprocessing .* and free sides \(--dyn"):
            refuse(NOTHING, chain)
    with pytest.raises(RefusedError, match=r"is there with preprocessing \(--mean"):
        refuse(Foreign(labels=("a", "b")), dynamic_hw=True)
    refuse(Foreign(labels=("a", "b"), preprocessing={"mean": (0.1,)}), dynamic_hw=True)
    refuse(NOTHING, force=True)
    refuse(NOTHING, replace(source, file="other.pt"))
    own = replace(network, labels=("x", "y"), preprocessing={**preprocessing, "mean": (0.0,)})
    refuse(NOTHING, retrained, own, dynamic_hw=True)
    with pytest.raises(RefusedError, match="labels .* and preprocessing"):
        refuse(NOTHING, source, own, dynamic_hw=True)
    refuse(NOTHING, source, replace(network, labels=known["labels"], preprocessing=preprocessing), dynamic_hw=True)
