"""`gmconv.asking`: what the command line names and takes, the public functions take too, and say so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from torch import nn

import export
import gmconv
import runtime
from export.deployment import ASKED
from export.onnx.__main__ import main
from export.onnx.options import ExportOptions
from export.onnx.refusals import NOTHING_BAKED
from export.precision.converter import PrecisionOptions
from gmconv.asking import Asked
from gmconv.errors import RefusedError
from gmconv.foreign import Foreign, foreign_options

_TAKEN = {
    "data",
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
    said = ASKED.in_python(f"it cannot be done: leave {flag} out")
    assert flag not in said.replace("=", " ").split()
    assert said.partition("leave ")[2].removesuffix(" out").partition("=")[0] in _TAKEN


@pytest.mark.parametrize(
    ("shell", "python"),
    [
        ("--keep-dynamic leaves it as it is", "keep_dynamic=True leaves it as it is"),
        ("give --batch N without --dynamic-hw", "give batch=N without dynamic_hw=True"),
        ("say --opset 18; say no more", "say opset=18; say no more"),
        ("give --images DIR or --images digits", "give images=DIR or images='digits'"),
        ("--data DIR, --data FILE.npz or", "data=DIR, data=FILE.npz or"),
        ("--keep-fp32 node_Conv_3 leaves it", "keep_fp32='node_Conv_3' leaves it"),
        ("--keep-fp32 'head*' matches no layer", "keep_fp32='head*' matches no layer"),
        ("with --keep-fp32 up1 --keep-fp32 up2", "with keep_fp32=('up1', 'up2')"),
        ("ask for --precision bf16 or fp16", "ask for precision='bf16' or fp16"),
        ("give -o another name", "give output another name"),
        ("-o /a/net.int8.onnx, or --force", "output='/a/net.int8.onnx', or force=True"),
        ("(--mean M,M,M --std S,S,S), as", '(preprocessing={"mean": (M, M, M), "std": (S, S, S)}), as'),
        ("--crop 0 cuts them", "crop=0 cuts them"),
        (
            "the exporter's own report, above unless -q, says more",
            "the exporter's own report, which note= gets, says more",
        ),
        (
            "on samples of 4 (no); check --input-shape, or give each input as --input NAME:SHAPE[:DTYPE]",
            "on samples of 4 (no); the examples are a batch of what it takes: a tensor, or a dict with one for each "
            "argument",
        ),
        ("layers 0--1 of a-o, --elsewhere", "layers 0--1 of a-o, --elsewhere"),
    ],
)
def test_sentences(shell: str, python: str) -> None:
    assert ASKED.in_python(shell) == python


def test_a_network_in_memory_has_no_checkpoint_to_blame() -> None:
    assert "--arch" in NOTHING_BAKED
    assert "checkpoint" not in ASKED.in_python(NOTHING_BAKED)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda file: runtime.time_artefacts(file, durations=1), "time_artefacts takes no .*did you mean duration"),
        (lambda file: runtime.score_artefacts(file, dat="val"), "score_artefacts takes no 'dat'; did you mean data"),
        (lambda file: runtime.compare_artefacts(file, file, tolerence=1), "did you mean tolerance"),
        (lambda file: runtime.serve.serve(file, http_prt=1), "serve takes no 'http_prt'; did you mean http_port"),
        (lambda file: export.export_onnx(file, "a.onnx", precission="fp16"), "did you mean precision"),
        (lambda file: export.convert_precision(file, None, "fp16", keep_fp="x"), "did you mean keep_fp32"),
        (lambda file: export.search_precision(file, "int8", max_top1=1), "did you mean max_top1_drop"),
        (lambda file: export.search_precision(file, "int8"), "needs a budget"),
        (lambda file: export.build_engine(file, "a.plan", flavour="rtx"), "did you mean flavor"),
        (lambda file: export.write_repository(file, "repo", delays=1), "did you mean delay"),
        (lambda file: runtime.time_artefacts(file, {"duration": 1}), "options is a dict; it takes Options, or its"),
        (lambda file: runtime.time_artefacts(file, zzz=1), "it takes .*duration.*seed.*warm_up"),
    ],
)
def test_an_option_that_there_is_not_is_answered_with_what_is_meant(call: Callable[[Path], object], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        call(Path("net.onnx"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda own: export.export_onnx(own, "y.onnx"), "export_onnx: source"),
        (lambda own: export.export_onnx("y.pt", own), "export_onnx: output"),
        (lambda own: export.convert_precision("y.onnx", own, "fp16"), "convert_precision: output"),
        (lambda own: export.build_engine(own, "y.plan"), "build_engine: onnx_path"),
        (lambda own: export.write_repository("y.onnx", own), "write_repository: repository"),
        (lambda own: runtime.compare_artefacts("y.pt", own), "compare_artefacts: candidates"),
        (lambda own: runtime.compare_artefacts("y.pt", ["y.onnx", own]), "compare_artefacts: candidates"),
        (lambda own: runtime.time_artefacts(own), "time_artefacts: artefacts"),
        (lambda own: runtime.score_artefacts([own]), "score_artefacts: artefacts"),
        (lambda own: runtime.serve.serve(own), "serve: source"),
        (lambda own: gmconv.deploy(nn.Tanh(), "y.onnx", own), "deploy: output"),
        (lambda own: gmconv.save_golden(nn.Tanh(), "y.npz", own), "save_golden: path"),
        (lambda own: gmconv.save_checkpoint(own, nn.Tanh(), "resnet8", (3, 8, 8)), "save_checkpoint: path"),
        (lambda own: gmconv.load_checkpoint(own), "load_checkpoint: path"),
    ],
)
def test_a_network_where_a_file_goes_is_called_one(call: Callable[[object], object], said: str) -> None:
    own = nn.Sequential(nn.Tanh())
    with pytest.raises(TypeError) as told:
        call(own)
    advice = "gmconv.deploy(model, examples) takes a network in memory"
    assert str(told.value) == f"{said} is a Sequential, and takes the name of a file; {advice}"


def test_files_may_come_one_by_one() -> None:
    """What yields them is not used up by looking."""
    with pytest.raises(RefusedError, match=r"a\.pt: no such file"):
        runtime.compare_artefacts("a.pt", (name for name in ("b.onnx", "c.onnx")))


@dataclass(frozen=True, kw_only=True)
class Loop:
    duration: float = 3.0
    iterations: int = 10


@dataclass(frozen=True, kw_only=True)
class Kind:
    images: str | None = None
    layers: tuple[str, ...] = ()
    loop: Loop = field(default_factory=Loop)
    calibration: str | None = None
    fuse: bool = False


@click.command()
@click.option("--data")
@click.option("--images")
@click.option("--duration", type=click.FloatRange(0))
@click.option("--layers", multiple=True)
@click.option("--fuse", is_flag=True)
def command() -> None:
    """What reads the values."""


ASKED_HERE = Asked(
    Kind, f"{__name__}:command", groups={"loop": Loop}, renamed={"data": "images,calibration", "sets": "layers"}
)


@ASKED_HERE.of
def function(options: Kind | None = None, *, force: bool = False, **choices: Any) -> Kind:
    if force:
        raise RefusedError("no: leave --force out, or give --data DIR, --no-fuse or --other")
    return ASKED_HERE(options, choices)


def test_arrays_where_a_command_takes_words_are_refused() -> None:
    for given, kind in ((np.zeros(2), "ndarray"), ((np.zeros(2), np.zeros(2)), "tuple of ndarray")):
        with pytest.raises(RefusedError, match=f"^data is a {kind}; it takes"):
            function(data=given)


def test_options_of_groups_are_said_flat_and_values_are_read_as_flags() -> None:
    assert function(duration="1", sets="conv*") == Kind(loop=Loop(duration=1.0), layers=("conv*",))
    assert function(Kind(loop=Loop(iterations=7)), duration=2) == Kind(loop=Loop(duration=2.0, iterations=7))
    assert function(data="a", images="b") == Kind(images="b", calibration="a")
    assert function(Kind(calibration="kept"), data=Path("a")) == Kind(images="a", calibration="kept")
    assert function(loop=Loop(duration=9), duration=None) == Kind(loop=Loop(duration=9))
    with pytest.raises(RefusedError, match="^duration=-1: -1.0 is not in the range"):
        function(duration=-1)
    with pytest.raises(RefusedError, match="^loop is a dict; it takes Loop"):
        function(loop={"duration": 1})


def test_a_refusal_keeps_its_class_and_code_and_names_parameters_unless_a_command_is_at_work() -> None:
    with pytest.raises(RefusedError, match="leave force=True out, or give data=DIR, fuse=False or --other") as refusal:
        function(force=True)
    assert refusal.value.exit_code == 3
    with click.Context(command), pytest.raises(RefusedError, match="leave --force out"):
        function(force=True)


def test_what_is_not_installed_is_said_with_the_line_that_installs_it() -> None:
    code = "import sys; sys.modules['torch'] = None; import gmconv; gmconv.deploy(None, None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UnavailableError: torch is not installed: " in done.stderr.splitlines()[-1]
