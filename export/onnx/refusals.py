"""What an export refuses, or warns of, before it works: from flags and headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from export.onnx.options import DEFAULT_OPSET, ExportOptions, crop_clash
from gmconv.data import refuse_missing
from gmconv.errors import ParityError, RefusedError, layer_words, printable
from gmconv.files import require_writable
from gmconv.foreign import Foreign
from gmconv.kinds import refuse_other_kinds, require_ending
from gmconv.npz import npz_names
from gmconv.packages import require
from gmconv.preprocessing import read_preprocessing
from runtime.artefact import Facts
from runtime.manifest import FileDigest, refuse_other_artefact, replaced_manifest, sidecar
from runtime.metadata import misfit

if TYPE_CHECKING:
    from gmconv import Checkpoint
    from gmconv.cropping.certificate import CropCertificate
    from runtime.runners.base import Array

NOTHING_BAKED = (
    "nothing was baked: no convolution and no product of matrices has a mask or computes its kernel; if the network "
    "was trained with Gaussian masks, this checkpoint lacks them, or --arch builds another network"
)
SPENT_ON_NOISE = "the crop budget was spent on noise, which says little of images: give --data"
_LAST = 15  # lines of what the exporter printed


def doubts(baked: bool, apart: float, crop: CropCertificate | None) -> tuple[str, ...]:
    """What the user should know of a proven network.

    That nothing was `baked`, that samples meet (`rows_apart`), or that noise chose the taps which a `crop` lost.
    """
    meet = (
        f"a sample's outputs depend on the others of its batch (by up to {apart:.1e} of their RMS): whoever merges or "
        f"pads batches gets other answers; gmconv serve and gmconv triton run each request alone"
    )
    on_noise = crop is not None and (crop.budget or {}).get("on_noise") and any(one.l1_removed for one in crop.layers)
    return (*[NOTHING_BAKED] * (not baked), *[meet] * (apart > 0), *[SPENT_ON_NOISE] * bool(on_noise))


def refuse_early(source: object, written: Sequence[Path], options: ExportOptions) -> None:
    """Before torch is imported: files that are not there, outputs that may not be written.

    Raises RefusedError, UnavailableError.
    """
    gain = options.crop_gain if options.crop_gain != "macs" else None
    if clash := crop_clash({"crop": options.crop, "crop_budget": options.crop_budget, "crop_gain": gain}):
        raise RefusedError(clash)
    read = [Path(file) for file in (source, options.images, options.golden) if isinstance(file, str | Path)]
    if isinstance(source, str | Path):
        refuse_other_kinds(Path(source), "checkpoint")
    for data in (options.images, options.calibrated.calibration):
        if data is not None:
            refuse_missing(data)
    if options.golden is not None:
        npz_names(options.golden)
    for file, precision in zip(written, options.precisions, strict=True):
        require_writable(file, *read)
        require_ending(file, "onnx")
        require_writable(sidecar(file))
        refuse_other_artefact(file, precision, target=options.calibrated.target, force=options.force)
        if clash := options.calibrated.io_clash(precision):
            raise RefusedError(clash)
    if options.opset > DEFAULT_OPSET and options.opset > (newest := require("onnx").defs.onnx_opset_version()):
        raise RefusedError(f"--opset {options.opset}: the installed onnx knows opsets up to {newest}")


def require_libraries(options: ExportOptions) -> None:
    """Import what an export needs. Raises UnavailableError."""
    for module in ("torch", "onnxruntime", "onnxscript", *(["onnxslim"] if options.simplify else [])):
        require(module)


def refuse_unfit_images(loaded: Checkpoint, options: ExportOptions) -> None:
    """Preprocessing for other channels than the network's, or that divides by zero; free sides or a crop of no image.

    Raises RefusedError.
    """
    if options.dynamic_hw and loaded.input_shape is None:
        raise RefusedError("--dynamic-hw frees height and width of images, and none of the inputs is one: leave it out")
    if options.crops and (len(loaded.inputs) != 1 or loaded.input_shape is None):
        raise RefusedError("cropping knows networks of one image, and this one takes something else; leave --crop out")
    preprocessing = read_preprocessing(loaded.preprocessing)
    if preprocessing is None or len(loaded.inputs) != 1 or loaded.input_shape is None:
        return
    if wrong := misfit(preprocessing, ("batch", loaded.input_shape[0], "height", "width")):
        raise RefusedError(
            f"the preprocessing {wrong}; give a number for each channel (--mean M,M,M --std S,S,S), as in training"
        )


def refuse_saying_less(
    loaded: Checkpoint, given: Foreign, chain: Sequence[FileDigest], written: Sequence[Path], options: ExportOptions
) -> None:
    """Where a file of the same source is there, and says what nobody said this time (`given`). Raises RefusedError."""
    preprocessing = read_preprocessing(loaded.preprocessing)
    for file in written if not options.force else ():
        found = replaced_manifest(file)
        if found is None or [link.file for link in found.chain[:1]] != [link.file for link in chain]:
            continue
        same = found.chain[:1] == tuple(chain)
        said = (
            ("labels (--labels)", given.labels, found.labels, loaded.labels),
            ("preprocessing (--mean M,M,M --std S,S,S)", given.preprocessing, found.preprocessing, preprocessing),
            ("golden pairs (--golden)", options.golden, found.golden, None),
            ("free sides (--dynamic-hw)", options.dynamic_hw or None, found.export and found.export.dynamic_hw, None),
        )
        lost = [
            what
            for what, now, there, here in said
            if now is None and there and (here is None or (same and there != here))
        ]
        if lost:
            raise RefusedError(
                f"{file}: is there with {' and '.join(lost)}, which this export does not have: give them again, or "
                f"another name with -o, or --force"
            )


def refuse_precisions(loaded: Checkpoint, options: ExportOptions) -> None:
    """Once the checkpoint is read: int8 and fp8 without anything to calibrate them on. Raises RefusedError."""
    from export.onnx.cases import graph_spec
    from export.precision.converter import open_calibration

    if not {"int8", "fp8"} & set(options.precisions):
        return
    specs = [graph_spec(one, options) for one in loaded.inputs]
    facts = Facts(loaded.input_shape, read_preprocessing(loaded.preprocessing), loaded.dataset)
    open_calibration(options.calibrated, specs, facts)


def refuse_two_answers(here: Mapping[str, Array], there: Mapping[str, Array]) -> None:
    """Where two processes loaded one checkpoint: their outputs for one batch. Raises RefusedError."""
    from gmconv.outputs import unlike

    if (found := unlike(here, there)) is not None:
        raise RefusedError(
            f"loaded twice, the network gives two answers (output {found[0]!r} differs by {found[1]:.1e} of its RMS)"
            f": its forward changes a buffer with each call, or draws random numbers, which it should not in eval "
            f"mode; or it holds random values that are no parameters or buffers, so that no checkpoint has them: "
            f"register them (self.register_buffer), or hand the network itself to gmconv.deploy"
        )


def refuse_two_kernels(baked_here: Mapping[str, str], baked_there: Mapping[str, str]) -> None:
    """The sha256 of each kernel that two processes baked. Raises ParityError."""
    for name in sorted(baked_here.keys() | baked_there.keys()):
        if baked_here.get(name) != baked_there.get(name):
            raise ParityError(f"{layer_words(name)}: two processes baked different weights; refusing to ship either")


def advice_on_parity(precision: str, options: ExportOptions) -> str:
    """What to do where the file of one of several precisions is not near enough to the network."""
    others = f"{_without(precision)}, or " if len(options.precisions) > 1 else ""
    ranges = "try another --calibration-method, or " if precision == "int8" else ""
    return f"{others}{ranges}keep the layers that cost it in fp32 (--keep-fp32 LAYER)"


@contextmanager
def all_or_none(precision: str, options: ExportOptions) -> Iterator[None]:
    """What one of several precisions is refused for is told with what became of the others."""
    try:
        yield
    except RefusedError as error:
        if len(options.precisions) == 1:
            raise
        raise RefusedError(f"{error.message}; nothing was written: {_without(precision)}") from error


def _without(precision: str) -> str:
    return f"leave {precision} out of --precision to have the others"


def last_words(chatter: str) -> str:
    """The end of what torch's exporter printed before it refused, or "": the graph before it can fill screens."""
    lines = [line for line in chatter.splitlines() if line.strip() and "torchvision is not installed" not in line]
    said = [printable(line, 200) for line in lines[-_LAST:]]
    return "\n".join(["the exporter said at last, all of it with -v:", *said]) if said else ""
