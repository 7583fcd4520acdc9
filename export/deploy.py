"""`gmconv.deploy`: a network in memory becomes a proven artefact, as a checkpoint does by the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
import numpy as np

from export.onnx.flags import crop_clash
from export.onnx.options import ExportOptions, Note
from export.precision.converter import PrecisionOptions
from export.wording import in_python, python_words
from gmconv.errors import RefusedError
from gmconv.foreign import Foreign, labels_of, preprocessing_fields
from gmconv.kinds import require_ending
from runtime.report.artefacts import artefact_sections
from runtime.report.shown import Shown

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from runtime.manifest import Manifest
    from runtime.report import Section

Flavor = Literal["auto", "tensorrt", "rtx"]
_OWN = {"note", "preprocessing", "labels", "flavor"}
_SEEDS = {"noise_seed": "seed", "seed": "calibration_seed"}  # click's names of two flags, and theirs here


@dataclass(frozen=True, slots=True, repr=False)
class Deployed(Shown):
    """What `deploy` wrote, and how it was proven; prints as the command's tables, in a notebook as a report.

    `manifests` holds what each file's sidecar says, in the order of `files`.
    """

    files: tuple[Path, ...]
    manifests: tuple[Manifest, ...]

    @property
    def path(self) -> Path:
        """The artefact that was asked for."""
        return self.files[-1] if self.manifests[-1].artefact.kind == "engine" else self.files[0]

    @property
    def passed(self) -> bool:
        """Whether each file's parity holds; an engine that could not run on this machine has none yet."""
        found = [manifest.parity for manifest in self.manifests]
        return all(parity is None or parity.passed or parity.result == "not run" for parity in found)

    def sections(self) -> list[Section]:
        """What the manifests say."""
        return artefact_sections(
            {file.name: manifest for file, manifest in zip(self.files, self.manifests, strict=True)}
        )

    def show(self, console: Console) -> None:
        """Print what the commands would."""
        from export.onnx.tables import print_export
        from export.tensorrt.command import parity_line, summary

        for index, (file, manifest) in enumerate(zip(self.files, self.manifests, strict=True)):
            if manifest.artefact.kind == "engine":
                for line in (*summary(file, manifest), parity_line(manifest)):
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print_export(file, first=index == 0, console=console, manifest=manifest, say=in_python)


def deploy(
    model: nn.Module,
    examples: Any,
    output: str | Path = "model.onnx",
    *,
    note: Note = lambda text: None,
    preprocessing: Mapping[str, Any] | str | Path | None = None,
    labels: Sequence[str] | str | Path | None = None,
    flavor: Flavor = "auto",
    **options: Any,
) -> Deployed:
    """Bake, export and prove a live network, of any class, also one defined in a notebook; it stays as it is.

    Args:
        model: the network as your program has it.
        examples: one batch of what its forward takes: a tensor, a tuple of tensors, or a dict by argument. The proof
            runs on them too, so real data says more than noise.
        output: the ONNX file; with the suffix .plan or .engine an engine, and the ONNX file beside it.
        note: called with a few words when a step begins.
        preprocessing: fields of `gmconv.images.Preprocessing`, or a JSON file of them, for serving and evaluation; the
            size and the channels are the examples' where they are not said.
        labels: class names in the order of the logits, or the file that has them one a line.
        flavor: of an engine: "tensorrt", "rtx" (TensorRT-RTX), or "auto", what is installed.
        options: fields of `export.onnx.ExportOptions` and of `export.precision.PrecisionOptions`: precisions, golden,
            batch, dynamic_hw, crop, images, keep_fp32, calibration, ...; also with the values and names of the command
            line (precision="fp16,int8", crop="1e-3", data="images/", calibration_seed=1).

    Returns:
        The files and their manifests; printed, the tables of the command.

    Raises:
        RefusedError, BakeError: the network cannot be exported like this; nothing was written.
        ParityError: the artefact does not compute what the network computes; nothing was written.
        BuildError, UnavailableError: the engine could not be built.
        TypeError: an option that there is not.
    """
    from export.onnx.pipeline import export_onnx
    from export.onnx.trained import Live
    from runtime.manifest import read_manifest

    output = Path(output)
    engine = require_ending(output, "onnx", "engine") == "engine"
    asked = _asked(options)
    if flavor not in get_args(Flavor):
        raise RefusedError(f"flavor={flavor!r}: it takes {', '.join(get_args(Flavor))}")
    live = Live(model, examples, Foreign(preprocessing=preprocessing_fields(preprocessing), labels=labels_of(labels)))
    written = output.with_suffix(".onnx") if engine else output
    if engine and len(asked.precisions) > 1:
        raise RefusedError("an engine has one precision; deploy each with a call of its own")
    with python_words():
        export_onnx(live, written, asked, note=lambda text: note(in_python(text)))
        files = asked.outputs(written)
        if engine:
            from export.tensorrt import BuildOptions, build_engine

            note(f"building {output}")
            build_engine(written, output, BuildOptions(flavor=flavor, golden=asked.golden))
            files.append(output)
    return Deployed(tuple(files), tuple(read_manifest(file, verify=False) for file in files))


def _asked(options: dict[str, Any]) -> ExportOptions:
    """The options by the names of both classes, or of the flags. Raises TypeError for another, and as `_parsed`."""
    if isinstance(options.get("precision"), str | tuple | list):  # as the command calls it
        options["precisions"] = options.pop("precision")
    export = {field.name for field in fields(ExportOptions)} - {"foreign"}
    conversion = {"calibration_seed" if field.name == "seed" else field.name for field in fields(PrecisionOptions)}
    known = export | conversion | {"data"}
    if unknown := sorted(options.keys() - known):
        close = difflib.get_close_matches(unknown[0], known | _OWN, n=1)
        advice = f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(known | _OWN))}"
        raise TypeError(f"deploy takes no {unknown[0]!r}; {advice}")
    given = {name: value for name, value in _parsed(options).items() if value is not None}
    if clash := crop_clash(given):
        raise RefusedError(in_python(clash))
    settings = given.get("precision", PrecisionOptions())
    if not isinstance(settings, PrecisionOptions):
        raise RefusedError(f"precision is a {type(settings).__name__}; it takes 'fp16,int8', or PrecisionOptions")
    if (data := given.pop("data", None)) is not None:
        given.setdefault("images", data)
        given.setdefault("calibration", settings.calibration or data)
    own = {name: given.pop(name) for name in conversion - export if name in given}
    if "calibration_seed" in own:
        own["seed"] = own.pop("calibration_seed")
    if own:
        given["precision"] = replace(settings, **own)
    return ExportOptions(**given)


def _parsed(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the command's own flags read them. Raises RefusedError, which says what a parameter takes."""
    from export.onnx.__main__ import main as command

    flags = {_SEEDS.get(str(flag.name), flag.name): flag for flag in command.params}
    context, parsed = click.Context(command), dict(options)
    for name, value in options.items():
        if name not in flags or value is None:
            continue
        if not isinstance(value, str | Path | Number | np.generic | tuple | list):
            takes = getattr(flags[name], "metavar", None) or "a plain value"
            raise RefusedError(f"{name} is a {type(value).__name__}; it takes {takes}")
        given: Any = value.item() if isinstance(value, np.generic) else value
        if getattr(flags[name], "multiple", False):
            given = value if isinstance(value, tuple | list) else [value]
        elif isinstance(value, tuple | list):
            given = ",".join(map(str, value))
        try:
            parsed[name] = flags[name].process_value(context, given)
        except click.UsageError as error:
            raise RefusedError(f"{name}={value!r}: {error.message}") from None
    return parsed
