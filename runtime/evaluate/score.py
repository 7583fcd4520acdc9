"""Accuracy of artefacts on labelled images: the function behind `python -m runtime.evaluate`.

Top-1, top-5 and the agreement with a reference, each with its 95 % interval, and what the disagreements are. The
reference is the live fp32 network where its checkpoint is given or lies beside the artefact, else the first artefact.
Q/DQ graphs are computed as written; what ONNX Runtime's own rewrites make of them is a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmconv.errors import ArchitectureUnavailableError, CheckpointError, RefusedError, UnavailableError
from gmconv.foreign import NOTHING, Foreign

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gmconv.data import Samples
    from gmconv.images import Preprocessing
    from runtime.evaluate.accuracy import Score
    from runtime.manifest import Manifest
    from runtime.runners.base import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """How to evaluate. `limit` samples at most, drawn by `seed`; `reference` None is found (see the module)."""

    images: str | Path = "digits"
    device: str = "cpu"
    reference: Path | None = None
    limit: int | None = None
    seed: int = 0
    batch: int = 32
    foreign: Foreign = NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtefactScore:
    """One row: `mode` is "" for most artefacts, "as written" or "as served" for a Q/DQ graph in ONNX Runtime."""

    artefact: str
    precision: str
    runner: str
    mode: str
    score: Score

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        named = {"artefact": self.artefact, "precision": self.precision, "runner": self.runner, "mode": self.mode}
        return named | self.score.to_dict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All rows, the reference they are measured against, and what to be wary of."""

    reference: str
    images: str
    samples: int
    rows: tuple[ArtefactScore, ...]
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "reference": self.reference,
            "images": self.images,
            "samples": self.samples,
            "rows": [row.to_dict() for row in self.rows],
            "warnings": list(self.warnings),
        }


def evaluate(artefacts: Sequence[Path], options: EvaluateOptions | None = None) -> Evaluation:
    """Run every artefact on the same labelled images.

    Raises RefusedError when an artefact or the images are unfit or the artefacts take different inputs, and
    UnavailableError when the device is missing.
    """
    from runtime.evaluate.accuracy import score
    from runtime.runners import open_runner
    from runtime.runners.qdq import layout_warning, reference_options, serving_options

    options = options or EvaluateOptions()
    if not artefacts:
        raise RefusedError("no artefact given")
    found = [_Artefact(path) for path in artefacts]
    reference, runner = _open_reference(found, options)
    with runner:
        reference.read_checkpoint(runner)
        about = next((a for a in (reference, *found) if a.known), reference)
        samples = _samples(about, runner, options)
        expected, labels = _logits(runner, samples, options.batch)
        baseline = (reference, runner.name)
    rows, warnings = [], []
    for artefact in found:
        warning = layout_warning(artefact.manifest, options.device)
        if warning:
            warnings.append(warning)
        as_written = reference_options(artefact.manifest)
        modes: list[tuple[str, dict[str, Any]]] = [("as written" if as_written else "", as_written)]
        if as_written and as_written != serving_options(artefact.manifest) and options.device == "cpu":
            modes.append(("as served", {}))
        logits = []
        for mode, extra in modes:
            if artefact.path == baseline[0].path and extra == reference_options(baseline[0].manifest):
                logits.append(expected)
                name = baseline[1]
            else:
                with open_runner(artefact.path, options.device, foreign=options.foreign, **extra) as runner:
                    logits.append(_logits(runner, samples, options.batch)[0])
                    name = runner.name
            rows.append(
                ArtefactScore(
                    artefact=artefact.path.name,
                    precision=artefact.precision,
                    runner=name,
                    mode=mode,
                    score=score(logits[-1], expected, labels),
                )
            )
        if len(logits) == 2:
            warnings += _rewrites_differ(artefact.path.name, logits[0], logits[1])
    return Evaluation(
        reference=reference.title,
        images=samples.name,
        samples=len(expected),
        rows=tuple(rows),
        warnings=tuple(warnings),
    )


class _Artefact:
    """A path, its kind and what its manifest or its checkpoint says about it."""

    def __init__(self, path: Path) -> None:
        from runtime.manifest import find_manifest
        from runtime.runners import artefact_kind

        self.path, self.kind = path, artefact_kind(path)
        self.manifest: Manifest | None = None if self.kind == "checkpoint" else find_manifest(path)
        self.precision = self.manifest.precision if self.manifest else "fp32" if self.kind == "checkpoint" else "?"
        self.preprocessing: Preprocessing | None = self.manifest.preprocessing if self.manifest else None
        self.dataset = self.manifest.dataset if self.manifest else None
        self.labels = self.manifest.labels if self.manifest else None
        self.known = self.manifest is not None

    @property
    def title(self) -> str:
        return f"live fp32 network of {self.path.name}" if self.kind == "checkpoint" else self.path.name

    def read_checkpoint(self, runner: Runner) -> None:
        """Take preprocessing, data set and labels from an opened checkpoint."""
        from gmconv.images import read_preprocessing

        checkpoint = getattr(runner, "checkpoint", None)
        if checkpoint is None:
            return
        if checkpoint.preprocessing is not None:
            self.preprocessing = read_preprocessing(checkpoint.preprocessing)
        self.dataset, self.known = checkpoint.dataset, True
        self.labels = tuple(checkpoint.labels) if checkpoint.labels else None


def _open_reference(found: Sequence[_Artefact], options: EvaluateOptions) -> tuple[_Artefact, Runner]:
    """What to compare with, open: the one asked for, a checkpoint given, the one beside an artefact, else the first.

    One beside an artefact that does not say what network it belongs to is passed over: nobody asked for it.
    """
    from runtime.runners import open_runner
    from runtime.runners.qdq import reference_options

    def opened(artefact: _Artefact) -> tuple[_Artefact, Runner]:
        more = reference_options(artefact.manifest)
        return artefact, open_runner(artefact.path, options.device, foreign=options.foreign, **more)

    chosen = _reference(found, options)
    if chosen in found or options.reference is not None:
        return opened(chosen)
    try:
        return opened(chosen)
    except (CheckpointError, ArchitectureUnavailableError, UnavailableError):
        return opened(found[0])


def _reference(found: Sequence[_Artefact], options: EvaluateOptions) -> _Artefact:
    """What to compare with: the one asked for, a checkpoint given, the one beside an artefact, else the first."""
    from gmconv.files import sha256_file

    if options.reference is not None:
        return _Artefact(options.reference)
    for artefact in found:
        if artefact.kind == "checkpoint":
            return artefact
    for artefact in found:
        link = artefact.manifest.source("checkpoint") if artefact.manifest else None
        beside = artefact.path.with_name(Path(link.file).name) if link else None
        if link and beside and beside.is_file() and sha256_file(beside) == link.sha256:
            return _Artefact(beside)
    return found[0]


def _samples(about: _Artefact, runner: Runner, options: EvaluateOptions) -> Samples:
    from gmconv.data import load_samples

    shape = runner.inputs[0].shape
    if len(runner.inputs) != 1 or len(shape) != 4:
        raise RefusedError(f"{about.path}: evaluation knows networks with one (N, C, H, W) input")
    sizes = tuple(
        size if isinstance(size, int) else about.preprocessing.size[axis - 1] if about.preprocessing and axis else 0
        for axis, size in enumerate(shape[1:])
    )
    if not all(sizes):
        raise RefusedError(f"{about.path}: height and width are dynamic and its manifest has no preprocessing size")
    return load_samples(
        options.images,
        input_shape=(sizes[0], sizes[1], sizes[2]),
        preprocessing=about.preprocessing,
        dataset=about.dataset,
        class_names=about.labels,
        limit=options.limit,
        seed=options.seed,
    )


def _logits(runner: Runner, samples: Samples, batch: int) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """The first output (N, K) float32 on all samples, and their labels. A fixed batch is padded and cut again."""
    import numpy as np

    from runtime.runners.base import numpy_dtype

    spec = runner.inputs[0]
    limits = [profile[spec.name].max[0] for profile in runner.profiles if spec.name in profile]
    fixed = spec.shape[0] if isinstance(spec.shape[0], int) else None
    size = fixed or min(batch, *limits) if limits else fixed or batch
    outputs, labels = [], []
    for part in samples.batches(size):
        images = part.images
        if fixed and len(images) < fixed:
            images = np.concatenate([images, np.repeat(images[-1:], fixed - len(images), axis=0)])
        feeds = {spec.name: np.ascontiguousarray(images.astype(numpy_dtype(spec.dtype)))}
        first = runner.run(feeds)[runner.outputs[0].name][: len(part.images)]
        outputs.append(first.astype(np.float32))
        if part.labels is not None:
            labels.append(part.labels)
    return np.concatenate(outputs), np.concatenate(labels) if labels else None


def _rewrites_differ(name: str, written: NDArray[np.float32], served: NDArray[np.float32]) -> list[str]:
    import numpy as np

    from runtime.parity.tolerances import TOLERANCES

    error = float(np.abs(written - served).max())
    scale = float(np.sqrt(np.square(written, dtype=np.float64).mean()))
    changed = int((written.argmax(1) != served.argmax(1)).sum())
    if not changed and error <= TOLERANCES["fp32"].max_rel_rms * scale:
        return []
    return [
        f"{name}: ONNX Runtime's Q/DQ rewrites change the result: outputs by up to {error:.3g} (RMS {scale:.3g}), the "
        f"class of {changed} of {len(written)} samples; TensorRT computes the graph as written"
    ]
