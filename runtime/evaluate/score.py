"""Accuracy of artefacts on labelled images: the function behind `python -m runtime.evaluate`.

Top-1, top-5 and the agreement with a reference, each with its 95 % interval, and what the disagreements are. The
reference is the live fp32 network where its checkpoint is given or lies beside the artefact, else the first artefact.
A Q/DQ graph runs as it is served (`runtime.runners.qdq`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmconv.errors import ArchitectureUnavailableError, CheckpointError, RefusedError, UnavailableError
from gmconv.foreign import NOTHING, Foreign
from runtime.artefact import Artefact, Facts, open_artefact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gmconv.data import Samples
    from runtime.evaluate.accuracy import Score
    from runtime.runners.base import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """How to evaluate. `images` None are the held-out digits, of a network trained on them; `limit` samples at most,
    drawn by `seed`; `reference` None is found (see the module); `labelled`: refuse images without labels."""

    images: str | Path | None = None
    device: str = "cpu"
    reference: Path | None = None
    limit: int | None = None
    seed: int = 0
    batch: int = 32
    foreign: Foreign = NOTHING
    labelled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtefactScore:
    """One row: `mode` is "as written" for a Q/DQ graph that ONNX Runtime may not rewrite, else ""."""

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
    labels: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "reference": self.reference,
            "images": self.images,
            "samples": self.samples,
            "rows": [row.to_dict() for row in self.rows],
            "labels": self.labels,
            "warnings": list(self.warnings),
        }


def evaluate(artefacts: Sequence[str | Path], options: EvaluateOptions | None = None) -> Evaluation:
    """Run every artefact on the same labelled images.

    Raises RefusedError when an artefact or the images are unfit or the artefacts take different inputs, and
    UnavailableError when the device is missing.
    """
    from runtime.evaluate.accuracy import score
    from runtime.runners import open_runner
    from runtime.runners.qdq import layout_warning, session_options

    options = options or EvaluateOptions()
    if not artefacts:
        raise RefusedError("no artefact given")
    found = [open_artefact(path) for path in artefacts]
    reference, runner = _open_reference(found, options)
    with runner:
        known = runner.artefact.facts
        for artefact in found:
            known = known | artefact.facts
        samples = _samples(known, runner, options)
        expected, labels = _logits(runner, samples, options.batch)
        name = runner.name
    rows, warnings = [], []
    for artefact in found:
        if warning := layout_warning(artefact.manifest, options.device):
            warnings.append(warning)
        logits, engine = expected, name
        if artefact.path != reference.path:
            with open_runner(artefact.path, options.device, foreign=options.foreign) as runner:
                logits, engine = _logits(runner, samples, options.batch)[0], runner.name
        rows.append(
            ArtefactScore(
                artefact=artefact.path.name,
                precision=artefact.precision,
                runner=engine,
                mode="as written" if session_options(artefact.manifest, "evaluate").as_written else "",
                score=score(logits, expected, labels),
            )
        )
    return Evaluation(
        reference=_title(reference),
        images=samples.name,
        samples=len(expected),
        rows=tuple(rows),
        labels=known.labels or samples.classes,
        warnings=tuple(warnings),
    )


def _title(reference: Artefact) -> str:
    name = reference.path.name
    return f"live fp32 network of {name}" if reference.kind == "checkpoint" else name


def _open_reference(found: Sequence[Artefact], options: EvaluateOptions) -> tuple[Artefact, Runner]:
    """What to compare with, open: the one asked for, a checkpoint given, the one beside an artefact, else the first.

    One beside an artefact that does not say what network it belongs to is passed over: nobody asked for it.
    """
    from runtime.runners import open_runner

    def opened(artefact: Artefact) -> tuple[Artefact, Runner]:
        return artefact, open_runner(artefact.path, options.device, foreign=options.foreign)

    chosen = _reference(found, options)
    if chosen in found or options.reference is not None:
        return opened(chosen)
    try:
        return opened(chosen)
    except (CheckpointError, ArchitectureUnavailableError, UnavailableError):
        return opened(found[0])


def _reference(found: Sequence[Artefact], options: EvaluateOptions) -> Artefact:
    """What to compare with: the one asked for, a checkpoint given, the one beside an artefact, else the first."""
    if options.reference is not None:
        return open_artefact(options.reference)
    given = next((artefact for artefact in found if artefact.kind == "checkpoint"), None)
    if given is not None:
        return given
    beside = next((path for artefact in found if (path := artefact.checkpoint()) is not None), None)
    return open_artefact(beside) if beside is not None else found[0]


def _samples(about: Facts, runner: Runner, options: EvaluateOptions) -> Samples:
    from gmconv.data import load_samples

    images = options.images or "digits"
    if str(images) == "digits" and (about.dataset or {}).get("name") != "digits":
        raise RefusedError(
            f"{runner.artefact.path}: nothing says that it was trained on digits, so they say nothing of it; give "
            f"--data DIR with a sub-folder of images per class, or --data FILE.npz"
        )
    shape = runner.inputs[0].shape
    if len(runner.inputs) != 1 or len(shape) != 4:
        raise RefusedError(f"{runner.artefact.path}: evaluation knows networks with one (N, C, H, W) input")
    sizes = tuple(
        size if isinstance(size, int) else about.preprocessing.size[axis - 1] if about.preprocessing and axis else 0
        for axis, size in enumerate(shape[1:])
    )
    if not all(sizes):
        raise RefusedError(
            f"{runner.artefact.path}: height and width are dynamic and its manifest has no preprocessing size"
        )
    samples = load_samples(
        images,
        input_shape=(sizes[0], sizes[1], sizes[2]),
        preprocessing=about.preprocessing,
        dataset=about.dataset,
        class_names=about.labels,
        limit=options.limit,
        seed=options.seed,
    )
    if samples.labels is None and options.labelled:
        raise RefusedError(f"{images} has no labels, so --max-top1-drop cannot be judged; use --min-agreement")
    return samples


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
