"""`export.wording`: every flag that a message may advise is a parameter of `gmconv.deploy` there."""

from __future__ import annotations

from dataclasses import fields

import click
import pytest

from export.onnx.__main__ import main
from export.onnx.options import ExportOptions
from export.onnx.refusals import NOTHING_BAKED
from export.precision.converter import PrecisionOptions
from export.wording import in_python, python_words
from gmconv.errors import RefusedError
from gmconv.foreign import Foreign, foreign_options

_TAKEN = {
    "output",
    "labels",
    "preprocessing",
    *(f.name for kind in (ExportOptions, PrecisionOptions) for f in fields(kind)),
}
#: What deploy has no use for: the checkpoint's own story, and how a command shows what it found.
_SHELL = {"--report", "--json", "--quiet", "--verbose", "--version", "--calibration-npz"}


def _flags() -> list[str]:
    foreign = click.command()(foreign_options(lambda foreign: Foreign()))
    theirs = {parameter.opts[-1] for parameter in foreign.params} - {"--labels", "--mean", "--std"}
    own = [parameter.opts[-1] for parameter in main.params if isinstance(parameter, click.Option)]
    return [flag for flag in own if flag not in theirs | _SHELL]


@pytest.mark.parametrize("flag", [flag for flag in _flags() if flag not in ("--mean", "--std", "--calibration-seed")])
def test_a_flag_of_the_export_is_a_parameter(flag: str) -> None:
    said = in_python(f"it cannot be done: leave {flag} out")
    assert flag not in said.replace("=", " ").split()
    assert said.partition("leave ")[2].removesuffix(" out").partition("=")[0] in _TAKEN


@pytest.mark.parametrize(
    ("shell", "python"),
    [
        ("--keep-dynamic leaves it as it is", "keep_dynamic=True leaves it as it is"),
        ("give --batch N without --dynamic-hw", "give batch=N without dynamic_hw=True"),
        ("say --opset 18; say no more", "say opset=18; say no more"),
        ("give --images DIR or --images digits", "give images=DIR or images='digits'"),
        ("--data DIR, --data FILE.npz or", "images=DIR, images=FILE.npz or"),
        ("--keep-fp32 node_Conv_3 leaves it", "keep_fp32='node_Conv_3' leaves it"),
        ("--keep-fp32 'head*' matches no layer", "keep_fp32='head*' matches no layer"),
        ("with --keep-fp32 up1 --keep-fp32 up2", "with keep_fp32=('up1', 'up2')"),
        ("ask for --precision bf16 or fp16", "ask for precisions=('bf16',) or fp16"),
        ("give -o another name", "give output another name"),
        ("(--mean M,M,M --std S,S,S), as", '(preprocessing={"mean": (M, M, M), "std": (S, S, S)}), as'),
        ("--crop 0 cuts them", "crop=0 cuts them"),
        (
            "the exporter's own report, above unless -q, says more",
            "the exporter's own report, which note= gets, says more",
        ),
        (
            "on 2x4 (no); check --input-shape, and give --input NAME:SHAPE for each of several inputs",
            "on 2x4 (no); the examples are a batch of what it takes: a tensor, or a dict with one for each argument",
        ),
        ("layers 0--1 of a-o, --elsewhere", "layers 0--1 of a-o, --elsewhere"),
    ],
)
def test_sentences(shell: str, python: str) -> None:
    assert in_python(shell) == python


def test_a_network_in_memory_has_no_checkpoint_to_blame() -> None:
    assert "--arch" in NOTHING_BAKED
    assert "checkpoint" not in in_python(NOTHING_BAKED)


def test_a_refusal_keeps_its_class_and_code() -> None:
    with pytest.raises(RefusedError, match=r"leave fuse=True out$") as refusal, python_words():
        raise RefusedError("it does not add up: leave --fuse out")
    assert refusal.value.message == "it does not add up: leave fuse=True out"
    assert refusal.value.exit_code == 3
