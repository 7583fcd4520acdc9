"""`gmconv.deploy`: a network in memory becomes a proven artefact, as a checkpoint does by the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from export.onnx.options import RENAMED, ExportOptions, Note
from export.onnx.refusals import NOTHING_BAKED
from export.precision.converter import PrecisionOptions
from gmconv.asking import Asked, silent
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
ASKED = Asked(
    ExportOptions,
    "export.onnx.__main__:main",
    groups={"precision": PrecisionOptions},
    renamed=RENAMED,
    without=("foreign",),
    phrases={  # what is said of a checkpoint or a shell, and what of a network in memory
        NOTHING_BAKED: NOTHING_BAKED.partition(", this checkpoint")[0],
        "check --input-shape, or give each input as --input NAME:SHAPE[:DTYPE]": (
            "the examples are a batch of what it takes: a tensor, or a dict with one for each argument"
        ),
        " at last, all of it with -v:": " at last:",
        ", above unless -q,": ", which note= gets,",
        ", or hand the network itself to gmconv.deploy": "",
    },
)


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

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the files, whether they passed, and their manifests."""
        manifests = [manifest.to_dict() for manifest in self.manifests]
        return {"files": [str(file) for file in self.files], "passed": self.passed, "manifests": manifests}

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
                print_export(file, first=index == 0, console=console, manifest=manifest, say=ASKED.in_python)


@ASKED.of
def deploy(
    model: nn.Module,
    examples: Any,
    output: str | Path = "model.onnx",
    *,
    note: Note | None = None,
    preprocessing: Mapping[str, Any] | str | Path | None = None,
    labels: Sequence[str] | str | Path | None = None,
    flavor: Flavor = "auto",
    **options: Any,
) -> Deployed:
    """Bake, export and prove a live network, of any class, also one defined in a notebook; it stays as it is.

    Args:
        model: the network as your program has it, also in `torch.compile`, data parallelism or an average of weights.
        examples: one batch of what its forward takes: a tensor, a tuple of tensors, or a dict by argument. The proof
            runs on them too, so real data says more than noise.
        output: the ONNX file; with the suffix .plan or .engine an engine, and the ONNX file beside it.
        note: called with a few words when a step begins.
        preprocessing: fields of `gmconv.preprocessing.Preprocessing`, or a JSON file of them, for serving and
            evaluation; the size and the channels are the examples' where they are not said.
        labels: class names in the order of the logits, or the file that has them one a line.
        flavor: of an engine: "tensorrt", "rtx" (TensorRT-RTX), or "auto", what is installed.
        options: fields of `export.onnx.ExportOptions` and of `export.precision.PrecisionOptions`: precisions, golden,
            batch, dynamic_hw, crop, images, keep_fp32, calibration, ...; also with the values and names of the command
            line (precision="fp16,int8", crop="1e-3", data="images/", calibration_seed=1), mean=, std=.

    An output alone is called "logits", the i-th of a tuple output_i, an entry of a dict by its key.

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
    from gmconv.surgery import network_within, require_module
    from runtime.manifest import read_manifest, refuse_other_artefact, refuse_unnamed

    require_module(model, "deploy")
    if options.keys() & {"auto_precision", "max_top1_drop", "min_snr"}:
        raise TypeError("deploy has no accuracy budget: deploy in fp32, then export.search_precision of the file")
    output = Path(output)
    engine = require_ending(output, "onnx", "engine") == "engine"
    said = dict(preprocessing_fields(preprocessing) or {})
    said |= {name: options.pop(name) for name in ("mean", "std") if name in options}
    asked, tell = ASKED(None, options), note or silent
    if flavor not in get_args(Flavor):
        raise RefusedError(f"flavor={flavor!r}: it takes {', '.join(get_args(Flavor))}")
    if flavor != "auto" and not engine:
        raise RefusedError(f"flavor={flavor!r} is of an engine: output={output.with_suffix('.plan').name!r} builds one")
    live = Live(network_within(model), examples, Foreign(preprocessing=said or None, labels=labels_of(labels)))
    written = output.with_suffix(".onnx") if engine else output
    if engine:
        from export.tensorrt import BuildOptions, build_engine
        from export.tensorrt.build import refuse_options
        from runtime import trt

        if len(asked.precisions) > 1:
            raise RefusedError("an engine has one precision; deploy each with a call of its own")
        if asked.calibrated.target == "cpu":
            raise RefusedError("target='cpu' is of an ONNX file for ONNX Runtime; an engine takes target='tensorrt'")
        precision = asked.precisions[0]
        apart = output.with_name(f"{output.stem}.{precision}{output.suffix}")
        refuse_unnamed(written, made_from="", cropped=asked.crops, force=asked.force)
        refuse_other_artefact(written, precision, instead=f"-o {apart}", force=asked.force)
        build = BuildOptions(flavor=flavor, golden=asked.golden)
        refuse_options(trt.choose_flavor(flavor)[0], build)
    export_onnx(live, written, asked, note=lambda text: tell(ASKED.in_python(text)))
    files = asked.outputs(written)
    if engine:
        tell(f"building {output}")
        build_engine(written, output, build)
        files.append(output)
    return Deployed(tuple(files), tuple(read_manifest(file, verify=False) for file in files))
