"""Messages name the flags of the commands; a caller of the Python functions reads their parameters in that place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import click

from export.onnx.options import ExportOptions
from export.onnx.refusals import NOTHING_BAKED
from export.precision.converter import PrecisionOptions
from export.precision.search import search_precision as search

_NORMALIZED = re.compile(r"--mean(?: M,M,M)?(?: and)? --std(?: S,S,S)?(?: \(or --preprocessing FILE\))?")
#: A flag, and what it is advised with: a placeholder (DIR, FILE.npz), a number or a word that is one of its values.
_FLAG = re.compile(
    r"(?<![\w-])(?:--keep-fp32 (?P<layers>[^\s;,)]+(?: --keep-fp32 [^\s;,)]+)*)|(?P<flag>--[a-z][a-z0-9-]*|-o)"
    r"(?: (?P<value>[A-Z][A-Z,:|]*(?:\.npz)?|\d[\w.]*|digits|lossless|fp16|bf16|int8|fp8)(?![\w-]))?)"
)
#: What is said of a checkpoint or a shell, and what of a network in memory.
_PHRASES = {
    NOTHING_BAKED: NOTHING_BAKED.partition(", this checkpoint")[0],
    "check --input-shape, and give --input NAME:SHAPE for each of several inputs": (
        "the examples are a batch of what it takes: a tensor, or a dict with one for each argument"
    ),
    " at last, all of it with -v:": " at last:",
    ", above unless -q,": ", which note= gets,",
    ", or hand the network itself to gmconv.deploy": "",
}
_RENAMED = {"data": "images", "calibration": "images", "precision": "precisions", "to": "precisions", "o": "output"}
_SWITCHES = {field.name for field in fields(ExportOptions) if field.type == "bool"}
_OPTIONS = {field.name for options in (ExportOptions, PrecisionOptions) for field in fields(options)}
_OPTIONS |= {"output", "labels", "preprocessing"}


def in_python(message: str) -> str:
    """`message` with `keep_dynamic=True` where it says `--keep-dynamic`; a flag that `deploy` lacks stays as it is."""
    for shell, python in _PHRASES.items():
        message = message.replace(shell, python)
    message = _NORMALIZED.sub('preprocessing={"mean": (M, M, M), "std": (S, S, S)}', message)
    return _FLAG.sub(_parameter, message)


def _parameter(found: re.Match[str]) -> str:
    if found["layers"]:
        layers = tuple(layer.strip("'") for layer in found["layers"].split(" --keep-fp32 "))
        return f"keep_fp32={layers if len(layers) > 1 else layers[0]!r}"
    name = found["flag"].lstrip("-").replace("-", "_")
    name, value = _RENAMED.get(name, name), found["value"]
    if name in _SWITCHES:
        return f"{name}=True" + (f" {value}" if value else "")
    if value and value.islower() and not value[0].isdigit():
        value = f"({value!r},)" if name == "precisions" else repr(value)
    if name not in _OPTIONS:
        return found[0]
    return f"{name}={value}" if value else name


@contextmanager
def python_words() -> Iterator[None]:
    """Have whatever is refused meanwhile say parameters in place of flags."""
    try:
        yield
    except click.ClickException as error:
        said = type(error)(in_python(error.message))
        raise said.with_traceback(error.__traceback__) from None  # the exporter's chain is hundreds of lines


#: `export.precision.search.search_precision`, as `export` has it.
search_precision = python_words()(search)
