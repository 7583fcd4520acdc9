"""`python -m export.precision model.onnx --to int8`: the fp32 graph in another precision, and what that cost.

TensorRT 11 reads precision from the ONNX file alone, so the file has to say it: fp16 and bf16 graphs are typed tensor
by tensor (`export.cast`), int8 and fp8 graphs carry Q/DQ (`export.quantize`) with ranges from real images
(`export.calibration`). Each result is checked, run once in ONNX Runtime and audited layer by layer against the fp32
weights before it gets its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from runtime.cli import Command, print_json, progress_console, result_console
from runtime.errors import RefusedError

if TYPE_CHECKING:
    from onnx import ModelProto

    from export.calibration import Calibration
    from export.plan import PrecisionPlan
    from export.tail_audit import LayerAudit
    from runtime.manifest import Manifest, Preprocessing

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionOptions:
    """How to convert. The defaults are those of the command line.

    `keep_fp32`: shell wildcards over layer, module path or node name. `target` is the runtime an int8 graph is laid out
    for. `calibration` is "digits", a folder of images or an .npz file; None takes the data set that the manifest names.
    `calibration_method` None is percentile for int8 and minmax for fp8 (a float type keeps small values without
    clipping). `plan` fixes which layers stay in fp32 or fp16. `external_data` None follows the source file.
    """

    keep_fp32: tuple[str, ...] = ()
    io_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    target: Literal["tensorrt", "cpu"] = "tensorrt"
    calibration: str | Path | None = None
    calibration_images: int | None = None
    calibration_method: Literal["entropy", "percentile", "minmax"] | None = None
    percentile: float = 99.99
    calibration_batch: int = 4
    seed: int = 0
    plan: PrecisionPlan | None = None
    external_data: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionAudit:
    """What a conversion did. `kept`: node -> why it stayed in fp32. Sizes are bytes of all initializers."""

    precision: Precision
    layers: tuple[LayerAudit, ...]
    kept: dict[str, str] = field(default_factory=dict)
    weight_bytes: int = 0
    weight_bytes_fp32: int = 0
    quantization: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None

    @property
    def size_ratio(self) -> float:
        """Bytes of the weights over their bytes in fp32."""
        return self.weight_bytes / self.weight_bytes_fp32

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the certificate in the manifest and for --json."""
        return {
            "precision": self.precision,
            "kept_fp32": self.kept,
            "weight_bytes": self.weight_bytes,
            "weight_bytes_fp32": self.weight_bytes_fp32,
            "layers": [layer.to_dict() for layer in self.layers],
        }


class PrecisionConverter:
    """One fp32 graph on its way to any number of precisions; the images are run through it once for all of them."""

    def __init__(
        self,
        model: ModelProto,
        options: PrecisionOptions,
        *,
        preprocessing: Preprocessing | None = None,
        dataset: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`model` is not changed. `preprocessing` and `dataset` are the manifest's; they say how to calibrate."""
        import onnx

        from export.onnx_graph import constants_to_initializers, effective_weights, name_nodes, refuse_unless_fp32

        refuse_unless_fp32(model, model.graph.name or "the graph")
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        name_nodes(self.model)
        constants_to_initializers(self.model)
        self.options, self.preprocessing, self.dataset, self.progress = options, preprocessing, dataset, progress
        self.weights = effective_weights(self.model)
        self._calibration: Calibration | None = None

    def convert(self, precision: Precision) -> tuple[ModelProto, PrecisionAudit]:
        """The graph in `precision`, checked and run once, and its audit.

        Raises RefusedError: a weight overflows, an op has no such kernel, `keep_fp32` matches nothing, the calibration
        images are unfit, or an activation is NaN.
        """
        from export.graph_check import check_and_run
        from export.onnx_graph import layers, match_layers

        options = self.options
        keep = match_layers(self.model, options.keep_fp32)
        half: set[str] = set()
        if options.plan is not None:
            by_layer = {layer.name: layer.node for layer in layers(self.model)}
            options.plan.refuse_unless_fits(by_layer, precision)
            keep |= {by_layer[name] for name, kind in options.plan.keep.items() if kind == "fp32"}
            half = {by_layer[name] for name, kind in options.plan.keep.items() if kind == "fp16"}
        converted, audit = self._convert(precision, keep, half)
        check_and_run(converted, precision)
        return converted, audit

    def _convert(self, precision: Precision, keep: set[str], half: set[str]) -> tuple[ModelProto, PrecisionAudit]:
        if precision == "fp32":
            return self.model, self._audit("fp32", self.model)
        if precision in ("fp16", "bf16"):
            from export.cast import cast_graph

            if self.options.io_dtype not in ("fp32", precision):
                raise click.UsageError(f"--io-dtype {self.options.io_dtype} does not go with --to {precision}")
            cast, report = cast_graph(self.model, precision, keep_fp32=keep, io_dtype=self.options.io_dtype)
            return cast, self._audit(precision, cast, report.kept)
        if self.options.io_dtype != "fp32":
            raise click.UsageError(f"--to {precision} keeps fp32 inputs and outputs; drop --io-dtype")
        return self.quantize(precision, keep, half)

    def quantize(self, precision: Precision, keep: set[str], half: set[str]) -> tuple[ModelProto, PrecisionAudit]:
        """int8 or fp8 with the nodes `keep` in fp32 and `half` in fp16; not checked."""
        from export.cast import cast_graph
        from export.quantize import quantize_graph

        assert precision in ("int8", "fp8")
        options, calibration, method = self.options, self.calibrate(), self.method(precision)
        ranges = calibration.ranges(method, options.percentile)
        graph = quantize_graph(self.model, ranges, to=precision, target=options.target, exclude=keep | half)
        if half:
            graph, _ = cast_graph(graph, "fp16", only=half)
        quantization = {
            "target": options.target,
            "activations": ("u8" if options.target == "cpu" else "s8") if precision == "int8" else "e4m3fn",
            "weights": "s8" if precision == "int8" else "e4m3fn",
            "per_channel": True,
            "quantized_bias": options.target == "cpu",
        }
        kept = dict.fromkeys(sorted(keep), "asked for") | dict.fromkeys(sorted(half), "asked for (fp16)")
        audit = self._audit(precision, graph, kept)
        return graph, replace(
            audit, quantization=quantization, calibration=calibration.info(method, options.percentile)
        )

    def method(self, precision: Precision) -> Literal["entropy", "percentile", "minmax"]:
        """The calibration method in force for `precision`."""
        return self.options.calibration_method or ("minmax" if precision == "fp8" else "percentile")

    def calibrate(self) -> Calibration:
        """The histograms of the activations, measured on the first call."""
        if self._calibration is None:
            from export.calibration import calibrate
            from export.calibration_images import open_images
            from export.graph_check import image_shape
            from export.quantize import tensors_to_calibrate

            batch, shape = image_shape(self.model)
            source = self.options.calibration or (self.dataset or {}).get("name")
            if source is None:
                raise RefusedError(
                    "int8 and fp8 need calibration images: give --calibration DIR, --calibration-npz FILE or, for "
                    "networks trained on them, --calibration digits"
                )
            images = open_images(
                source,
                shape,
                limit=self.options.calibration_images,
                seed=self.options.seed,
                preprocessing=self.preprocessing,
                dataset=self.dataset,
            )
            images.batch, images.fixed_batch = batch or self.options.calibration_batch, batch is not None
            tensors = tensors_to_calibrate(self.model, self.options.target)
            self._calibration = calibrate(self.model, images, tensors, progress=self.progress)
        return self._calibration

    def _audit(self, precision: Precision, graph: ModelProto, kept: dict[str, str] | None = None) -> PrecisionAudit:
        from export.onnx_graph import effective_weights, precision_by_layer, weight_bytes
        from export.tail_audit import audit_layers

        return PrecisionAudit(
            precision=precision,
            layers=audit_layers(self.weights, effective_weights(graph), precision_by_layer(graph)),
            kept=kept or {},
            weight_bytes=weight_bytes(graph),
            weight_bytes_fp32=weight_bytes(self.model),
        )


def convert_graph(
    model: ModelProto, precision: Precision, options: PrecisionOptions | None = None, **source: Any
) -> tuple[ModelProto, PrecisionAudit]:
    """One precision of an fp32 graph in memory; see `PrecisionConverter`, whose keyword arguments `source` are."""
    return PrecisionConverter(model, options or PrecisionOptions(), **source).convert(precision)


def with_precision(manifest: Manifest, model: ModelProto, audit: PrecisionAudit) -> Manifest:
    """`manifest` as it reads for the converted graph: precision, layers found, audit in the certificate, inputs.

    What was proven or timed for the source file is dropped: this is another file.
    """
    from export.graph_check import tensor_specs

    inputs, outputs = tensor_specs(model)
    return replace(
        manifest,
        inputs=inputs,
        outputs=outputs,
        precision=audit.precision,
        precision_found=dict(Counter(layer.precision for layer in audit.layers)),
        certificate=(manifest.certificate or {}) | {"precision": audit.to_dict()},
        quantization=audit.quantization,
        calibration=audit.calibration,
        parity=None,
        benchmark=None,
    )


def convert_precision(
    onnx_path: Path,
    output: Path | None,
    precision: Precision,
    options: PrecisionOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Manifest:
    """Convert the fp32 ONNX file `onnx_path` and write `output` (default `model.<precision>.onnx`) with its manifest.

    Raises RefusedError as `PrecisionConverter.convert`, and when the file is unreadable, quantized or fp16 already.
    """
    from export.graph_check import bare_manifest, save_graph
    from export.onnx_graph import load_fp32
    from runtime.manifest import digest, find_manifest

    options = options or PrecisionOptions()
    output = output or default_output(onnx_path, precision)
    if output.resolve() == onnx_path.resolve():
        raise RefusedError(f"{output}: is the fp32 graph itself; give -o another name")
    model = load_fp32(onnx_path)
    source = find_manifest(onnx_path) or bare_manifest(onnx_path, model)
    converter = PrecisionConverter(
        model, options, preprocessing=source.preprocessing, dataset=source.dataset, progress=progress
    )
    converted, audit = converter.convert(precision)
    manifest = with_precision(source, converted, audit)
    manifest = replace(manifest, chain=(*source.chain, digest(onnx_path, "onnx")))
    external = bool(source.external) if options.external_data is None else options.external_data
    return save_graph(converted, output, manifest, external=external)


def default_output(onnx_path: Path, precision: str) -> Path:
    """`model.onnx` -> `model.int8.onnx`."""
    return onnx_path.with_name(f"{onnx_path.stem}.{precision}.onnx")


def precision_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that `export.precision` and `export.onnx` share."""
    flags = [
        click.option(
            "--keep-fp32", multiple=True, metavar="PATTERN", help="Layers to leave in fp32 (wildcards; repeat)."
        ),
        click.option("--io-dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True),
        click.option(
            "--target",
            type=click.Choice(["tensorrt", "cpu"]),
            default="tensorrt",
            show_default=True,
            help="The runtime that an int8 graph is laid out for.",
        ),
        click.option("--calibration", metavar="DIR|digits", help="Calibration images."),
        click.option(
            "--calibration-npz", type=click.Path(path_type=Path), help="Preprocessed float32 (N, C, H, W) in an .npz."
        ),
        click.option("--calibration-images", type=click.IntRange(2), help="How many of them [256]."),
        click.option(
            "--calibration-method",
            type=click.Choice(["entropy", "percentile", "minmax"]),
            help="[percentile for int8, minmax for fp8]",
        ),
        click.option("--percentile", type=click.FloatRange(50, 100), default=99.99, show_default=True),
        click.option("--calibration-seed", "seed", type=int, default=0, show_default=True),
    ]
    for flag in reversed(flags):
        command = flag(command)
    return command


def options_from_flags(flags: dict[str, Any]) -> PrecisionOptions:
    """`PrecisionOptions` out of the values of `precision_flags`; other keys are ignored."""
    if flags.get("calibration") and flags.get("calibration_npz"):
        raise click.UsageError("--calibration and --calibration-npz exclude each other")
    return PrecisionOptions(
        keep_fp32=tuple(flags["keep_fp32"]),
        io_dtype=flags["io_dtype"],
        target=flags["target"],
        calibration=flags["calibration_npz"] or flags["calibration"],
        calibration_images=flags["calibration_images"],
        calibration_method=flags["calibration_method"],
        percentile=flags["percentile"],
        seed=flags["seed"],
    )


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--to", "precision", type=click.Choice(PRECISIONS), help="The precision to convert to.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[model.PRECISION.onnx]")
@precision_flags
@click.option("--auto-precision", type=click.Choice(["int8", "fp8"]), help="Quantize, keeping sensitive layers higher.")
@click.option("--max-top1-drop", type=click.FloatRange(0, 100), help="Budget: points of top-1 that may be lost.")
@click.option("--min-snr", type=float, help="Budget: least output signal-to-noise ratio, dB.")
@click.option(
    "--images", default=None, metavar="DIR|digits", help="Images the budget is measured on [held-out digits]."
)
@click.option("--keep-as", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True)
@click.option("--plan", type=click.Path(path_type=Path), help="Layers to keep, from an earlier --auto-precision.")
@click.option(
    "--save-plan", type=click.Path(path_type=Path), help="Where --auto-precision writes it [OUTPUT.plan.json]."
)
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def main(model: Path, precision: Precision | None, output: Path | None, **flags: Any) -> None:
    """Convert the fp32 graph MODEL (ONNX) to fp16, bf16, int8 or fp8."""
    from export.progress import progress_bar

    options = options_from_flags(flags)
    automatic = flags["auto_precision"]
    if (precision is None) == (automatic is None):
        raise click.UsageError("give one of --to and --auto-precision")
    budgets = (flags["max_top1_drop"], flags["min_snr"])
    if automatic is None and any(budget is not None for budget in budgets):
        raise click.UsageError("--max-top1-drop and --min-snr go with --auto-precision")
    if automatic and all(budget is None for budget in budgets):
        raise click.UsageError("--auto-precision needs a budget: --max-top1-drop POINTS or --min-snr DB")
    console = progress_console(flags["quiet"])
    if flags["plan"] is not None:
        from export.plan import read_plan

        options = replace(options, plan=read_plan(flags["plan"]))
    if automatic:
        from export.sensitivity import auto_precision

        manifest = auto_precision(model, output, automatic, options, flags, console)
    else:
        assert precision is not None
        with progress_bar(console, "calibrating") as progress:
            manifest = convert_precision(model, output, precision, options, progress=progress)
    if flags["as_json"]:
        import msgspec

        print_json(msgspec.to_builtins(manifest))
        return
    _print_result(manifest)


def _print_result(manifest: Manifest) -> None:
    from export.tail_audit import LayerAudit, audit_table

    done = (manifest.certificate or {})["precision"]
    found = ", ".join(f"{count} {kind}" for kind, count in manifest.precision_found.items())
    ratio = done["weight_bytes"] / done["weight_bytes_fp32"]
    console = result_console()
    console.print(audit_table([LayerAudit(**layer) for layer in done["layers"]], f"tail audit: {manifest.precision}"))
    console.print(f"{manifest.artefact.file}: {found}; weights {ratio:.3f}x of fp32, {manifest.artefact.bytes:,} bytes")


if __name__ == "__main__":
    main()
