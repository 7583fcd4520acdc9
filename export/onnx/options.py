"""How to export: one object, whose defaults are those of the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from export.precision.converter import PrecisionOptions
from gmconv.asking import Asked
from gmconv.foreign import NOTHING, OTHERWISE, Foreign

if TYPE_CHECKING:
    from export.precision.converter import Precision

DEFAULT_OPSET = 20
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How to export. The defaults are those of the command line.

    `foreign` says what a foreign checkpoint does not say of itself. `batch` None leaves the batch axis
    dynamic; `dynamic_hw` frees height and width too. `samples` real images are compared besides seeded noise. `crop` is
    a tolerance or "lossless" (see `gmconv.crop`), `crop_budget` what `export.crop.budget.parse_budget` reads and
    `crop_gain` what it buys.
    `golden`: pairs that the user's own program recorded (`gmconv.save_golden`), to be compared with first.
    `keep_dynamic` leaves kernels that depend on the input in the graph as they are; without it they are refused. `fuse`
    calls the methods by which modules merge their own branches, and measures the result.
    `images` calibrate int8 and fp8 too, unless `precision` names others. `precisions`: see `outputs`; a file of another
    precision, or one that says what this export does not (labels, preprocessing, golden pairs, free sides), is
    overwritten with `force` alone.
    """

    foreign: Foreign = NOTHING
    batch: int | None = None
    dynamic_hw: bool = False
    opset: int = DEFAULT_OPSET
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    simplify: bool = False
    external_data: bool = False
    images: str | Path | None = None
    golden: Path | None = None
    samples: int = 64
    seed: int = 0
    crop: float | Literal["lossless"] | None = None
    crop_budget: str | None = None
    crop_gain: Literal["macs", "latency"] = "macs"
    keep_dynamic: bool = False
    fuse: bool = False
    precisions: tuple[Precision, ...] = ("fp32",)
    precision: PrecisionOptions | None = None
    force: bool = False

    @property
    def calibrated(self) -> PrecisionOptions:
        """`precision` with calibration images, where there are any."""
        settings = self.precision or PrecisionOptions()
        return replace(settings, calibration=settings.calibration or self.images)

    @property
    def bake_options(self) -> dict[str, Any]:
        """Keyword arguments of `gmconv.constants.bake_for_inputs`."""
        dynamic = "keep" if self.keep_dynamic else "refuse"
        return {"batch": self.batch, "dynamic_hw": self.dynamic_hw, "dynamic": dynamic}

    @property
    def crops(self) -> bool:
        """Whether kernels are cut."""
        return self.crop is not None or self.crop_budget is not None

    def outputs(self, output: Path) -> list[Path]:
        """The files that an export to `output` writes, in the order of `precisions`; manifests and data aside.

        One precision takes the name as it is; of several fp32 does, and the others are `NAME.PRECISION.onnx`.
        """
        if len(self.precisions) == 1:
            return [output]
        return [output if p == "fp32" else output.with_name(f"{output.stem}.{p}.onnx") for p in self.precisions]

    def confirmed(self, warnings: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Warnings of a checkpoint as notes, where golden pairs that held confirm what they say; and those left: the
        pairs are of inputs that somebody had prepared."""
        if self.golden is None:
            return (), warnings
        by = f"confirmed by {self.golden.name}:"
        left = tuple(text for text in warnings if text.startswith(OTHERWISE))
        held = [text for text in warnings if text not in left]
        return tuple(text.partition(";")[0].replace("assumed:", by, 1) for text in held), left


#: Names of the command line that mean several fields, or one of another name.
RENAMED = {"precision": "precisions", "data": "images,precision.calibration", "calibration_seed": "precision.seed"}
ASKED = Asked(
    ExportOptions,
    "export.onnx.__main__:main",
    groups={"precision": PrecisionOptions, "foreign": Foreign},
    renamed={**RENAMED, "input": "foreign.inputs"},
)


def nothing_lowered(options: ExportOptions) -> str:
    """Why layers cannot be kept in fp32: all of them are; empty where some would not be, or none was named."""
    if options.precision and options.precision.keep_fp32 and set(options.precisions) == {"fp32"}:
        return "--keep-fp32: without a lower --precision every layer is in fp32; give one, or leave it out"
    return ""


def crop_clash(given: Mapping[str, Any]) -> str:
    """Why the options of cropping do not go together; empty where they do."""
    if given.get("crop") is not None and given.get("crop_budget") is not None:
        return "--crop and --crop-budget exclude each other"
    if given.get("crop_gain") is not None and given.get("crop_budget") is None:
        return "--crop-gain says what a --crop-budget buys; give a budget, or leave it out"
    return ""
