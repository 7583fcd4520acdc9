"""From an fp32 graph in memory to any precision: options, the conversion, and the audit of what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from gmconv.asking import Asked
from gmconv.errors import RefusedError
from runtime import records
from runtime.artefact import Facts

if TYPE_CHECKING:
    from onnx import ModelProto

    from export.graph.check import Feeds, Overflow
    from export.precision.audit import LayerAudit
    from export.precision.calibration import Calibration
    from export.precision.calibration_images import CalibrationImages
    from export.precision.plan import PrecisionPlan
    from runtime.manifest import Manifest, TensorSpec

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Progress = Callable[[int, int], None]
_NOTHING = Facts()
_MOST_ADVICE = 24  # nodes; a network that needs more of them in fp32 is better exported in bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionOptions:
    """How to convert. The defaults are those of the command line.

    `keep_fp32`: shell wildcards over layer, module path or node name. `target` is the runtime an int8 graph is laid out
    for. `calibration` is "digits", a folder of images or an .npz file; None takes the data set that the manifest names.
    `calibration_method` None is percentile for int8 and minmax for fp8 (a float type keeps small values without
    clipping). `plan` fixes which layers stay in fp32 or fp16. `external_data` None follows the source file.
    """

    keep_fp32: tuple[str, ...] = ()
    io_dtype: Literal["fp32", "fp16"] = "fp32"
    target: Literal["tensorrt", "cpu"] = "tensorrt"
    calibration: str | Path | None = None
    calibration_images: int | None = None
    calibration_method: Literal["entropy", "percentile", "minmax"] | None = None
    percentile: float = 99.99
    calibration_batch: int = 4
    seed: int = 0
    plan: PrecisionPlan | None = None
    external_data: bool | None = None

    @property
    def kept(self) -> tuple[str, ...]:
        """Wildcards over what stays above the precision, by `keep_fp32` or by the plan."""
        return (*self.keep_fp32, *(self.plan.keep if self.plan else ()))

    def io_clash(self, precision: Precision) -> str:
        """Why `io_dtype` does not go with `precision`; empty where it does."""
        if self.io_dtype in ("fp32", precision):
            return ""
        if precision in ("fp16", "bf16"):
            return f"--io-dtype {self.io_dtype} does not go with {precision}"
        return f"{precision} keeps fp32 inputs and outputs; drop --io-dtype"

    def follow(self, plan: PrecisionPlan) -> PrecisionOptions:
        """These options with `plan`, its target and its calibration, so that the same graph comes out.

        Calibration images that are not scikit-learn's digits have to be given again: a plan holds no paths.
        """
        planned = replace(self, plan=plan, target=plan.target)
        used = plan.calibration
        if used is None:
            return planned
        return replace(
            planned,
            calibration=self.calibration or ("digits" if used.source == "digits" else None),
            calibration_images=used.images,
            calibration_method=used.method or self.calibration_method,
            percentile=self.percentile if used.percentile is None else used.percentile,
            seed=self.seed if used.seed is None else used.seed,
        )


def asked_precision(*own: str) -> Asked[PrecisionOptions]:
    """How a function that converts an ONNX file takes its options; `own`: more names, which it sees to itself."""
    renamed = {"data": "calibration,", "calibration_seed": "seed", **dict.fromkeys(own, ",")}
    return Asked(PrecisionOptions, "export.precision.__main__:main", renamed=renamed, objects=("plan",))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionAudit:
    """What a conversion did. `kept`: node -> why it stayed in fp32. Sizes are bytes of all initializers."""

    precision: Precision
    layers: tuple[LayerAudit, ...]
    kept: dict[str, str] = field(default_factory=dict)
    weight_bytes: int = 0
    weight_bytes_fp32: int = 0
    quantization: records.Quantization | None = None
    calibration: records.Calibration | None = None

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
        facts: Facts = _NOTHING,
        samples: Sequence[Feeds] = (),
        progress: Progress | None = None,
    ) -> None:
        """`model` is not changed. `facts` are the manifest's; they say how to calibrate.

        `samples`: real inputs, batches by input name; no tensor may overflow on them.
        """
        import onnx

        from export.graph.read import constants_to_initializers, effective_weights, name_nodes, refuse_unless_fp32

        refuse_unless_fp32(model, model.graph.name or "the graph")
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        name_nodes(self.model)
        constants_to_initializers(self.model)
        self.options, self.facts, self.progress = options, facts, progress
        self.samples = samples
        self.weights = effective_weights(self.model)
        self._calibration: Calibration | None = None

    def convert(self, precision: Precision) -> tuple[ModelProto, PrecisionAudit]:
        """The graph in `precision`, checked and run once, and its audit.

        Raises RefusedError: a weight overflows, an op has no such kernel, `keep_fp32` matches nothing, the calibration
        images are unfit, or an activation is NaN.
        """
        from export.graph.check import check_and_run
        from export.graph.read import layers, match_layers

        options = self.options
        keep = match_layers(self.model, options.keep_fp32)
        half: set[str] = set()
        if options.plan is not None:
            by_layer = {layer.name: layer.node for layer in layers(self.model)}
            options.plan.refuse_unless_fits(by_layer, precision)
            keep |= {by_layer[name] for name, kind in options.plan.keep.items() if kind == "fp32"}
            half = {by_layer[name] for name, kind in options.plan.keep.items() if kind == "fp16"}
        converted, audit = self._convert(precision, keep, half)
        if options.plan is not None:
            options.plan.refuse_other_calibration(audit.calibration)
        if overflow := check_and_run(converted, precision, self.samples, self.facts.preprocessing):
            raise RefusedError(f"{precision}: {overflow}; {self._advice(overflow, precision, keep, half)}")
        return converted, audit

    def _advice(self, overflow: Overflow, precision: Precision, keep: set[str], half: set[str]) -> str:
        """Which `--keep-fp32` mend an overflow, found by trying: what one node no longer loses, the next one may."""
        from export.graph.check import check_and_run
        from export.graph.read import layers

        more: dict[str, None] = {}
        found: Overflow | None = overflow
        while found is not None and set(found.nodes) - keep - set(more) and len(more) < _MOST_ADVICE:
            more |= dict.fromkeys(node for node in found.nodes if node not in keep)
            converted, _ = self._convert(precision, keep | set(more), half)
            found = check_and_run(converted, precision, self.samples, self.facts.preprocessing)
        if found is not None:
            return "keeping layers in fp32 does not mend it: check the checkpoint's weights, or take another precision"
        names = {layer.node: layer.name for layer in layers(self.model)}
        return " ".join(f"--keep-fp32 {names.get(node, node)}" for node in more) + " keeps what overflows in fp32"

    def _convert(self, precision: Precision, keep: set[str], half: set[str]) -> tuple[ModelProto, PrecisionAudit]:
        if precision == "fp32":
            return self.model, self._audit("fp32", self.model)
        if clash := self.options.io_clash(precision):
            raise RefusedError(clash)
        if precision in ("fp16", "bf16"):
            from export.precision.cast import cast_graph
            from export.precision.quantize import without_kernel

            unable = precision == "bf16" and self.options.target == "tensorrt"
            lacking = without_kernel(self.model, "bf16") if unable else {}
            cast, report = cast_graph(
                self.model, precision, keep_fp32=keep | lacking.keys(), io_dtype=self.options.io_dtype
            )
            told = {node: why for node, why in lacking.items() if node not in keep}
            return cast, self._audit(precision, cast, report.kept | told)
        return self.quantize(precision, keep, half)

    def quantize(self, precision: Precision, keep: set[str], half: set[str]) -> tuple[ModelProto, PrecisionAudit]:
        """int8 or fp8 with the nodes `keep` in fp32 and `half` in fp16; not checked."""
        from export.precision.cast import cast_graph
        from export.precision.quantize import picked_by_a_maximum, quantize_graph, without_kernel

        assert precision in ("int8", "fp8")
        options, calibration, method = self.options, self.calibrate(), self.method(precision)
        ranges = calibration.ranges(method, options.percentile)
        whole = calibration.ranges("minmax")
        ranges |= {name: whole[name] for name in picked_by_a_maximum(self.model) if name in whole}
        kept = dict.fromkeys(sorted(keep), "asked for") | dict.fromkeys(sorted(half), "asked for (fp16)")
        if options.target == "tensorrt":
            lacking = {node: why for node, why in without_kernel(self.model, precision).items() if node not in kept}
            kept |= lacking
            half = half | lacking.keys()
        graph = quantize_graph(self.model, ranges, to=precision, target=options.target, exclude=keep | half)
        if half:
            graph, _ = cast_graph(graph, "fp16", only=half)
        quantization = records.Quantization(
            target=options.target,
            activations=("u8" if options.target == "cpu" else "s8") if precision == "int8" else "e4m3fn",
            weights="s8" if precision == "int8" else "e4m3fn",
            quantized_bias=options.target == "cpu",
            reduced_range=options.target == "cpu",
        )
        audit = self._audit(precision, graph, kept)
        return graph, replace(
            audit, quantization=quantization, calibration=calibration.info(method, options.percentile)
        )

    def method(self, precision: Precision) -> Literal["entropy", "percentile", "minmax"]:
        """The calibration method in force for `precision`."""
        return self.options.calibration_method or ("minmax" if precision == "fp8" else "percentile")

    def doubts(self, precision: str) -> str:
        """What makes the ranges doubtful, each with "; " behind it: to be mended first where `precision` is refused."""
        known = self._calibration if precision in ("int8", "fp8") else None
        return "".join(f"{text}; " for text in known.origin.warnings) if known else ""

    def calibrate(self) -> Calibration:
        """The histograms of the activations, measured on the first call."""
        if self._calibration is None:
            from export.graph.check import tensor_specs
            from export.precision.calibration import calibrate
            from export.precision.quantize import tensors_to_calibrate

            specs, _ = tensor_specs(self.model)
            images = open_calibration(self.options, specs, self.facts)
            batch = specs[0].shape[0]
            images.fixed_batch = isinstance(batch, int)
            images.batch = batch if isinstance(batch, int) else self.options.calibration_batch
            tensors = tensors_to_calibrate(self.model, self.options.target)
            self._calibration = calibrate(self.model, images, tensors, progress=self.progress)
        return self._calibration

    def _audit(self, precision: Precision, graph: ModelProto, kept: dict[str, str] | None = None) -> PrecisionAudit:
        from export.graph.read import effective_weights, precision_by_layer, weight_bytes
        from export.precision.audit import audit_layers

        return PrecisionAudit(
            precision=precision,
            layers=audit_layers(self.weights, effective_weights(graph), precision_by_layer(graph)),
            kept=kept or {},
            weight_bytes=weight_bytes(graph),
            weight_bytes_fp32=weight_bytes(self.model),
        )


def open_calibration(options: PrecisionOptions, specs: Sequence[TensorSpec], facts: Facts) -> CalibrationImages:
    """The samples that `options` name, else those of the data set that the network was trained on, if it is here.

    `specs`: what the network takes; free sides are those of `runtime.runners.feeds.sized`.
    Raises RefusedError as `open_images` and `open_arrays`, and when neither names any.
    """
    from export.precision.calibration_images import open_arrays, open_images
    from gmconv.data import trained_on
    from runtime.runners.feeds import sized, sizeless, taken

    source = options.calibration or trained_on(facts.dataset)
    if source is None:
        raise RefusedError(
            "int8 and fp8 need calibration images: give --data DIR, --data FILE.npz or, for networks trained on them, "
            "--data digits"
        )
    limit, seed = options.calibration_images, options.seed
    shape = sized(specs, facts, source)[0].shape[1:]
    if len(specs) == 1 and len(shape) == 3:
        if not all(isinstance(side, int) for side in shape):
            raise RefusedError(sizeless(specs[0]))
        image: Any = shape
        about: Any = {"preprocessing": facts.preprocessing, "dataset": facts.dataset}
        return open_images(source, image, limit=limit, seed=seed, **about)
    if Path(source).suffix == ".npz":
        return open_arrays(Path(source), specs, limit=limit, seed=seed)
    raise RefusedError(
        f"{source}: int8 and fp8 are calibrated on images of one size or on --data FILE.npz with an array of each "
        f"input by its name; this network takes {taken(specs)}"
    )


def with_precision(manifest: Manifest, model: ModelProto, audit: PrecisionAudit) -> Manifest:
    """`manifest` as it reads for the converted graph: precision, layers found, audit in the certificate, inputs.

    What was proven or timed for the source file is dropped: this is another file.
    """
    from export.graph.check import tensor_specs
    from runtime.manifest import FP8_ELSEWHERE

    inputs, outputs = tensor_specs(model)
    export = manifest.export
    if audit.precision == "fp8":
        opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
        batch = inputs[0].shape[0]
        export = export or records.Export(opset=opset, batch=batch if isinstance(batch, int) else "dynamic")
        export = replace(export, warnings=(*export.warnings, FP8_ELSEWHERE))
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
        export=export,
    )
