"""What a manifest records, typed: crop, parity, quantization, calibration, export, build, benchmark, device.

Values only; nothing here reads a file. A number that was not measured, or has no meaning, is None (JSON has no NaN).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: The hop of a proof in which bits have to be equal, and what ends the name of one with activations unrounded.
BAKING = "live -> baked"
UNROUNDED = ", activations unrounded"


@dataclass(frozen=True, slots=True, kw_only=True)
class CropLayer:
    """One convolution before and after the crop; `gmconv.cropping.certificate.CroppedLayer` says what each is."""

    name: str
    kernel: tuple[int, int]
    kept: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    in_channels: int = 0
    out_channels: int = 0
    padding_mode: str = "zeros"
    pads_before: tuple[int, int, int, int] = (0, 0, 0, 0)
    pads_after: tuple[int, int, int, int] = (0, 0, 0, 0)
    l1_removed: float | None = None
    energy_removed: float | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    max_abs_input: float | None = None
    max_abs_source: str | None = None
    bound: float | None = None
    bounds: tuple[float, ...] = ()
    measured: float | None = None
    measured_rms: float | None = None
    magnitude: tuple[tuple[float, ...], ...] = ()
    latency_before_ms: float | None = None
    latency_after_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CropError:
    """The cropped network against the uncropped one on the crop's data, relative to the RMS of the outputs."""

    samples: int
    relative_rms: float
    relative_max: float
    max_abs: float | None = None
    rms: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CropChoice:
    """A window that a budget could buy for one layer: what it costs, what it gains, and whether it was taken."""

    layer: str
    kept: tuple[int, int]
    cost: float
    gain: float
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CropTrial:
    """A crop that was run end to end; `top1`: of agreement where there are no labels, None without classes."""

    macs: int
    spent: float
    top1: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CropBudget:
    """What was asked for (`kind` "error": relative; "top1": points, of the first of `outputs`) and what it bought."""

    asked: str = ""
    kind: str = ""
    value: float = 0.0
    spent: float | None = None
    gain_by: str = ""
    gain: float | None = None
    labels: bool = False
    outputs: int = 1
    options: tuple[CropChoice, ...] = ()
    trials: tuple[CropTrial, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CropSumOrder:
    """What a lossless crop changes in fp32 by another order of the sums, and the layers left `whole` because of it."""

    limit: float
    error: float = 0.0
    error_of_all: float = 0.0
    whole: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """The crop of a network; `gmconv.cropping.certificate.CropCertificate` says what each field is."""

    tolerance: float | Literal["lossless"] | None = None
    precision: str = "fp32"
    layers: tuple[CropLayer, ...] = ()
    macs_before: int | None = None
    macs_after: int | None = None
    end_to_end: CropError | None = None
    measured_on: str | None = None
    budget: CropBudget | None = None
    sum_order: CropSumOrder | None = None
    used_elsewhere: tuple[str, ...] = ()

    @property
    def removes_only_zeros(self) -> bool:
        """Whether it removed nothing, or taps of exactly zero."""
        return all(layer.l1_removed == 0 for layer in self.layers)

    @property
    def spent_on_data(self) -> bool:
        """Whether a budget chose which taps to lose: its promise is measured on images, and noise lies outside."""
        return self.budget is not None and not self.removes_only_zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How Q/DQ pairs were laid out: for whom, and the types. `reduced_range`: weights use 7 of their 8 bits."""

    target: Literal["tensorrt", "cpu"]
    activations: str = ""
    weights: str = ""
    per_channel: bool = True
    quantized_bias: bool = False
    reduced_range: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the ranges of a quantized graph were measured on: base name or "digits", images, sha256 of the data."""

    source: str
    images: int
    method: Literal["", "entropy", "percentile", "minmax"] = ""
    seed: int | None = None
    sha256: str | None = None
    tensors: int = 0
    percentile: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisRange:
    """The lengths of a free axis for which a graph computes what its network does; `max` None: no end is known."""

    min: int = 1
    max: int | None = None

    def __contains__(self, length: int) -> bool:
        """Whether an axis may be so long."""
        return self.min <= length and (self.max is None or length <= self.max)

    def __str__(self) -> str:
        """In words: "1 to 16", "201 and more"."""
        return f"{self.min} and more" if self.max is None else f"{self.min} to {self.max}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """How the ONNX file was made. `batch`: its fixed size; `rows_meet`: samples depend on the others of their batch;
    `shapes`: of one sample of each input as the network is mostly used, also of free sides; `fuse`: if asked for."""

    opset: int
    batch: int | Literal["dynamic"] = "dynamic"
    dynamic_hw: bool = False
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    simplify: bool = False
    fuse: bool = False
    operators: dict[str, int] = field(default_factory=dict)
    rows_meet: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingCache:
    """The builder's timing cache: base name and its size before the build."""

    file: str
    bytes_before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayers:
    """What the layer list of a built engine says, summed over its profiles."""

    profiles: int = 1
    total: int = 0
    convolutions: int = 0
    convolution_precisions: dict[str, int] = field(default_factory=dict)
    fused_epilogues: int = 0
    mask_multiplications: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """How an engine was built, and what came of it. `seconds` by phase, `peak_memory` in bytes."""

    flavor: Literal["tensorrt", "rtx"]
    flavor_reason: str = ""
    tf32: bool = False
    workspace_mib: float | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    profiling_verbosity: str = "detailed"
    strip: bool = False
    refit: bool = False
    forced: bool = False
    timing_cache: TimingCache | None = None
    layers: EngineLayers = field(default_factory=EngineLayers)
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The GPU that an engine was built on. `compute_capability` as "8.9", memory in bytes, `cuda` the driver's."""

    index: int = 0
    name: str = ""
    compute_capability: str = ""
    memory: int = 0
    driver: str = ""
    cuda: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A timing; `result` "not run" has a `reason`. `*_ms`: count, min, max, mean, median, cv and percentiles ("p99"),
    None where nothing measured them. `mode` and `machine` are open sets: how the runner was set, what disturbed it."""

    artefact: str
    result: Literal["measured", "not run"] = "measured"
    reason: str = ""
    queries: int = 0
    warm_up_queries: int = 0
    throughput_qps: float | None = None
    wall_time_s: float | None = None
    latency_ms: dict[str, float] | None = None
    enqueue_ms: dict[str, float] | None = None
    h2d_ms: dict[str, float] | None = None
    gpu_compute_ms: dict[str, float] | None = None
    d2h_ms: dict[str, float] | None = None
    drift: float | None = None
    mode: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    interrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What a candidate of one precision may differ by; `runtime.parity.tolerances` has the table and its reasons.

    `rel_rms`: RMS(error) / RMS(reference). `max_rel_rms`: largest |error| / RMS(reference); never relative to a single
    value, which explodes near zero. `cosine`: at least this. `top1`: at least this share of the samples whose class the
    reference decides by more than twice `rel_rms` keeps its class. `agreement`: at least this share of the values of an
    integer or boolean output. `noise`, `noise_peak`: at most so many times the RMS and the largest error that the
    precision's own rounding costs this network; None where that is not asked. `source`: where the numbers come from.
    """

    precision: str
    rel_rms: float
    max_rel_rms: float
    cosine: float
    top1: float
    agreement: float = 1.0
    noise: float | None = None
    noise_peak: float | None = None
    source: str = ""
    overridden: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether ranges were calibrated on data: noise then lies outside what the graph was made for."""
        return self.precision in ("int8", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputComparison:
    """One output, compared over all samples of a case.

    `rel_rms` = RMS(error) / RMS(reference); `max_rel_rms` = `max_abs` / RMS(reference); `snr_db` = -20 log10(rel_rms).
    `top1`, `top5`: share of samples whose classes agree (outputs of shape (N, K >= 2)); `top1_decided`: the same over
    the `decided` samples, whose reference margin (first minus second logit) exceeds 2 * tolerance * RMS(reference).
    `disagreement_margin`: largest reference margin among the samples that disagree. `variation`: RMS of the reference's
    change from sample to sample over its RMS, over all cases. `agreement`: share of an integer or boolean output's
    values that are equal. `tolerance`: of `rel_rms`. `margin`: tolerance / found, the worst of the judged numbers;
    above 1 passes, None: equal, or it did not decide. With activations unrounded both are of all samples of a kind.
    """

    output: str
    samples: int
    passed: bool
    reason: str = ""
    precision: str = ""
    tolerance: float = 0.0
    max_abs: float | None = None
    mean_abs: float | None = None
    rel_rms: float | None = None
    max_rel_rms: float | None = None
    snr_db: float | None = None
    cosine: float | None = None
    top1: float | None = None
    top5: float | None = None
    decided: int = 0
    top1_decided: float | None = None
    disagreement_margin: float | None = None
    variation: float | None = None
    agreement: float | None = None
    margin: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class YardstickComparison:
    """How far reference and candidate are from a float64 run of the same network, RMS relative to its RMS.

    `candidate_rel_rms` None: the candidate rounds or is cropped on purpose, and is not held to it.
    """

    output: str
    samples: int
    passed: bool
    reason: str = ""
    reference_rel_rms: float | None = None
    candidate_rel_rms: float | None = None
    factor: float = 4.0
    limit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One arrow of a proof on one kind of inputs: `reference` against `candidate`, output by output.

    `inputs` says what they ran on ("noise, seed 0", "held-out digits", "golden pair"), `shapes` the shape of a batch by
    input. `bitwise`: every bit was equal; in the hop `BAKING` it has to be. `tolerance`: what was judged by.
    """

    name: str
    reference: str
    candidate: str
    inputs: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: tuple[OutputComparison, ...] = ()
    bitwise: bool | None = None
    tolerance: Tolerance | None = None

    @property
    def passed(self) -> bool:
        """Whether something was compared, and all of it held."""
        return bool(self.outputs) and all(o.passed for o in self.outputs) and (self.bitwise or self.name != BAKING)

    @property
    def shape(self) -> str:
        """The shapes of a batch in words: "8x3x32x32"."""
        return ", ".join("x".join(map(str, shape)) for shape in self.shapes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What was proven of an artefact, in one shape for ONNX files and engines: hops, and the float64 yardstick.

    `result` "not run" has a `reason`. `reference`: base name of the file at its start; `engine`: what ran the artefact.
    """

    result: Literal["passed", "not run"] = "passed"
    reason: str = ""
    reference: str = ""
    engine: str = ""
    hops: tuple[Hop, ...] = ()
    yardstick: tuple[YardstickComparison, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it was run and held; a comparison of nothing does not."""
        found = bool(self.hops) and all(hop.passed for hop in self.hops)
        return self.result == "passed" and found and all(item.passed for item in self.yardstick)

    def sentence(self) -> str:
        """ "passed", or "not run (why)"."""
        return self.result + (f" ({self.reason})" if self.reason else "")
