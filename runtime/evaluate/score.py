"""Accuracy of artefacts on labelled images: the function behind `python -m runtime.evaluate`.

Top-1 and top-5 of classes, intersection over union of masks, or a metric of the user's own; each with its 95 % interval
and with what the artefact loses against a reference: the live fp32 network where its checkpoint is given or lies beside
the artefact, else the first artefact of several, else the ONNX file that the only one was made from. A Q/DQ graph runs
as it is served (`runtime.runners.qdq`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmconv.asking import Asked
from gmconv.errors import ArchitectureUnavailableError, CheckpointError, RefusedError, UnavailableError, printable
from gmconv.files import each_path
from gmconv.foreign import NOTHING, Foreign
from gmconv.splits import Part
from runtime.artefact import Artefact, Facts, open_artefact, other_source
from runtime.evaluate.feeds import image_input, is_image, other_inputs, outputs_of, sample_array, sample_shape
from runtime.evaluate.report import ArtefactScore, Evaluation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gmconv.data import Samples
    from runtime.evaluate.accuracy import ClassJudge, Score
    from runtime.evaluate.metric import Metric, MetricJudge, MetricScore
    from runtime.evaluate.pixels import PixelJudge, PixelScore
    from runtime.evaluate.prepared import Prepared
    from runtime.runners.base import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """How to evaluate. `images` None are the held-out digits, of a network trained on them; `limit` samples at most,
    drawn by `seed`; `reference` None is found (see the module); `labelled`: refuse images without labels.
    `compared`: refuse an artefact that only itself could be compared with.

    `part`: of data that training split, or that lies in train and val. `output`: the one that is judged, of several.
    `metric`: a function as `runtime.evaluate.metric` says, or its name, `"package.module:function"`."""

    images: str | Path | None = None
    device: str = "cpu"
    reference: Path | None = None
    limit: int | None = None
    seed: int = 0
    batch: int = 32
    foreign: Foreign = NOTHING
    labelled: bool = False
    compared: bool = False
    part: Part = "held-out"
    output: str | None = None
    metric: str | Metric | None = None


_ASKED = Asked(
    EvaluateOptions,
    "runtime.evaluate.__main__:main",
    groups={"foreign": Foreign},
    renamed={"data": "images", "split": "part", "input": "foreign.inputs"},
    objects=("metric",),
)


@_ASKED.of
def score_artefacts(
    artefacts: str | Path | Sequence[str | Path], options: EvaluateOptions | None = None, **choices: Any
) -> Evaluation:
    """Run every artefact, or the only one, on the same labelled images, prepared by its own preprocessing.

    `choices` are fields of `EvaluateOptions` by name and value as on the command line: data="val/", split, output,
    metric, device, reference, limit, seed, batch; and arch, input_shape, labels, ... of a foreign checkpoint. Limits,
    --max-drop and --min-agreement, are the command line's alone.

    Raises RefusedError when an artefact, the images or the metric are unfit or the artefacts take different inputs, or
    their preprocessing differs and the images are prepared already; UnavailableError when the device is missing, and
    TypeError for an option that there is not.
    """
    from runtime.runners import open_runner
    from runtime.runners.neighbours import with_neighbours
    from runtime.runners.qdq import layout_warning, session_options

    options = _with_metric(_ASKED(options, choices))
    found = [open_artefact(path) for path in each_path(artefacts)]
    for artefact in found:
        artefact.require_agreement(options.foreign.preprocessing)
    named = [*(artefact.path for artefact in found), *filter(None, [options.reference])]
    options = replace(options, foreign=with_neighbours(options.foreign, named))
    with ExitStack() as stack:
        reference, runner, passed_over = _open_reference(found, options)
        runners = [stack.enter_context(runner)]
        if options.compared and all(artefact.path == reference.path for artefact in found):
            advice = passed_over or "the checkpoint or the fp32 file that it was made from"
            raise RefusedError(f"{reference.path} would be compared with itself: give --reference FILE ({advice})")
        options.foreign.refuse_idle([artefact.path for artefact in (*found, reference)])
        for artefact in found:
            same = artefact.path == reference.path
            opened = runner if same else open_runner(artefact.path, options.device, foreign=options.foreign)
            runners.append(runner if same else stack.enter_context(opened))
        known = functools.reduce(operator.or_, (one.artefact.facts for one in runners))
        prepared, others = _samples(known, runners, options)
        samples = prepared.views[0]
        names = _output_names(runners, found)
        judge = _judge(samples, names, runners, options)
        scores = _scores(judge, runners, prepared, others, names, options)
        rows = [
            ArtefactScore(
                artefact=artefact.path.name,
                precision=artefact.precision,
                runner=opened.name,
                mode="as written" if session_options(artefact.manifest, "evaluate").as_written else "",
                score=score,
                is_reference=opened is runner,
            )
            for artefact, opened, score in zip(found, runners[1:], scores, strict=True)
        ]
    assumed = dict.fromkeys(text for one in runners for text in one.artefact.assumed)
    misnamed = judge.misnamed(known.labels) if hasattr(judge, "misnamed") else ""
    doubts = (_doubt(samples, known, options), getattr(judge, "resized", None), misnamed)
    sources = (other_source(runner.artefact, one.artefact) for one in runners[1:])
    layouts = (layout_warning(artefact.manifest, options.device) for artefact in found)
    return Evaluation(
        reference=_title(reference),
        images=samples.name + _stretched(known, options.images),
        part=samples.part,
        samples=len(samples),
        rows=tuple(rows),
        labels=None if misnamed else known.labels or samples.classes,
        output=getattr(judge, "output", None) if len(names) > 1 else None,
        outputs=names,
        warnings=tuple(filter(None, (*sources, *prepared.warnings, *assumed, *layouts, passed_over, *doubts))),
    )


evaluate = score_artefacts


def _with_metric(options: EvaluateOptions) -> EvaluateOptions:
    from runtime.evaluate.metric import load_metric

    return replace(options, metric=load_metric(options.metric)) if isinstance(options.metric, str) else options


def _scores(
    judge: ClassJudge | PixelJudge | MetricJudge,
    runners: Sequence[Runner],
    prepared: Prepared,
    others: Mapping[str, NDArray[Any]],
    names: Sequence[str],
    options: EvaluateOptions,
) -> Sequence[Score | PixelScore | MetricScore]:
    """Of the runners but the first, the reference, in order. `others`: inputs beside the image."""
    done, image, data = 0, image_input(runners[0]).name, prepared.views[0].name
    for batch, images in prepared.batches(options.batch):
        taken = slice(done, done := done + len(batch.images))
        beside = {name: array[taken] for name, array in others.items()}
        given = {}
        for one, own in dict(zip(runners, images, strict=True)).items():
            feeds = {s.name: own if s.name == image else beside[s.name] for s in runners[0].inputs}
            given[id(one)] = outputs_of(one, names, feeds)
        for one in runners if options.metric is None else ():
            _require_sound(one, given[id(one)][judge.output], len(batch.images), judge.output, data)  # type: ignore[union-attr]
        with _about(data, options):
            judge.add([given[id(one)] for one in runners], batch)
    with _about(data, options):
        return judge.scores()[1:]


@contextmanager
def _about(images: str, options: EvaluateOptions) -> Iterator[None]:
    """What labels or masks are refused for is told with the data they belong to."""
    try:
        yield
    except RefusedError as error:
        if options.metric is not None:
            raise
        raise RefusedError(f"{images}: {error.message}") from error


def _require_sound(runner: Runner, found: NDArray[Any], count: int, output: str, images: str) -> None:
    """Raise RefusedError where an output says nothing of each of `count` samples."""
    import numpy as np

    said = f"{runner.artefact.path}: output {output!r}"
    if len(found) != count:
        raise RefusedError(f"{said} has {len(found)} rows for {count} samples; choose another by --output")
    if not np.isfinite(found).all():
        raise RefusedError(f"{said} is NaN or infinite on {images}; no accuracy can be given")


def _unlabelled(samples: Samples, options: EvaluateOptions) -> bool:
    return options.metric is None and samples.labels is None and not samples.masked


def _doubt(samples: Samples, known: Facts, options: EvaluateOptions) -> str | None:
    """What makes the scores say less than they seem to."""
    from gmconv.classes import composed, in_order

    if _unlabelled(samples, options):
        return f"{samples.name} has no labels: only agreement with the reference is measured"
    if samples.nameless:
        return f"{samples.name}: the network names no classes; {in_order(samples.nameless)}"
    if samples.masked and options.images and (lone := _lone_masks(Path(options.images))):
        named = f"{lone[0]}{', …' * (len(lone) > 1)}"
        return f"{samples.name}: {len(lone)} masks without an image ({named}): nothing is judged by them"
    if options.part == "train" and samples.part == "all":
        return f"nothing says which part of {samples.name} was trained on: all of it was taken"
    labels = [composed(label) for label in known.labels or ()]
    if samples.classes and labels and not set(samples.classes) <= set(labels):
        shown = ", ".join(f"{name} is {label}" for name, label in zip(samples.classes[:3], labels, strict=False))
        more = ", …" if len(samples.classes) > 3 else ""
        odd = ", ".join([name for name in samples.classes if name not in labels][:5])
        return (
            f"{samples.name}: sub-folders {odd} are no labels of the network; all taken in their order: {shown}{more}"
        )
    if samples.labels is not None and known.labels and options.limit is None:
        present = set(samples.labels.tolist())
        if lacking := [name for index, name in enumerate(known.labels) if index not in present]:
            return f"{samples.name} has no images of {printable(', '.join(lacking), 200)}: nothing is said of them"
    return None


def _lone_masks(folder: Path) -> list[Path]:
    """The masks in a folder of `images` and `masks` whose image is not there, in any of its parts."""
    from gmconv.images import image_files

    sides: dict[str, dict[tuple[str, ...], Path]] = {"images": {}, "masks": {}}
    for file in image_files(folder) if folder.is_dir() else ():
        *above, name = file.relative_to(folder).parts
        if side := next((part for part in above if part in sides), None):
            above.remove(side)
            sides[side][(*above, Path(name).stem)] = file.relative_to(folder)
    return [mask for key, mask in sides["masks"].items() if key not in sides["images"]]


def _judge(
    samples: Samples, names: Sequence[str], runners: Sequence[Runner], options: EvaluateOptions
) -> ClassJudge | PixelJudge | MetricJudge:
    """Who scores: the user's metric, the masks, or the classes. Raises RefusedError where there is nothing to score."""
    from runtime.evaluate.accuracy import ClassJudge
    from runtime.evaluate.metric import MetricJudge
    from runtime.evaluate.pixels import PixelJudge

    if runners[1:] == runners[:1] and _unlabelled(samples, options):
        raise RefusedError(
            f"{options.images}: has no labels (a sub-folder per class, images/ and masks/, 'labels' in an .npz), and "
            f"{runners[0].artefact.path.name} would be compared with itself: give labelled images, a "
            f"--metric for what else is there, or --reference"
        )
    if options.metric is not None:
        assert not isinstance(options.metric, str)
        return MetricJudge(options.metric, getattr(options.metric, "__name__", "metric"), samples.targets())
    if options.output is not None and options.output not in names:
        raise RefusedError(f"there is no output {options.output!r} (--output); there are {', '.join(names)}")
    output = options.output or names[0]
    return PixelJudge(output) if samples.masked else ClassJudge(output, samples.nameless)


def _output_names(runners: Sequence[Runner], found: Sequence[Artefact]) -> tuple[str, ...]:
    """The outputs, as an exported file among the artefacts names them, else as the reference does.

    Raises RefusedError where the artefacts have not the same number.
    """
    exported = (one for one, artefact in zip(runners[1:], found, strict=True) if artefact.kind != "checkpoint")
    chosen = next(exported, runners[0])
    for one in runners:
        if len(one.outputs) != len(chosen.outputs):
            raise RefusedError(
                f"{one.artefact.path} has {len(one.outputs)} outputs, {chosen.artefact.path} {len(chosen.outputs)}: "
                f"they are not the same network"
            )
    return tuple(spec.name for spec in chosen.outputs)


def _title(reference: Artefact) -> str:
    name = reference.path.name
    return f"live fp32 network of {name}" if reference.kind == "checkpoint" else name


def _open_reference(found: Sequence[Artefact], options: EvaluateOptions) -> tuple[Artefact, Runner, str | None]:
    """What to compare with, open, and why a checkpoint beside an artefact is not it: nobody asked for that one, so it
    is passed over where it does not say what network it belongs to.
    """
    from runtime.runners import open_runner

    specs = [spec for artefact in found if artefact.manifest for spec in artefact.manifest.inputs]
    free = any(isinstance(side, str) for spec in specs for side in spec.shape[1:])

    def opened(artefact: Artefact) -> Runner:
        more = {"dynamic_hw": free} if artefact.kind == "checkpoint" else {}
        return open_runner(artefact.path, options.device, foreign=options.foreign, **more)

    if options.reference is not None:
        return (chosen := open_artefact(options.reference)), opened(chosen), None
    given = next((artefact for artefact in found if artefact.kind == "checkpoint"), None)
    if given is not None:
        return given, opened(given), None
    reason = None
    made = next(((artefact, path) for artefact in found if (path := artefact.checkpoint()) is not None), None)
    if made is not None:
        artefact, source = made
        try:
            return (live := open_artefact(source)), opened(live), None
        except (CheckpointError, ArchitectureUnavailableError, UnavailableError) as error:
            said = f"{source.name}, which {artefact.path.name} was made from, was not compared with"
            reason = f"{said}: {error.message}"
    graph = found[0].fp32_graph() if len(found) == 1 else None
    chosen = found[0] if graph is None else open_artefact(graph)
    return chosen, opened(chosen), reason


def _stretched(known: Facts, images: str | Path | None) -> str:
    """How photos came to their size, where that is no crop of them: it costs accuracy where training did otherwise."""
    prepared = known.preprocessing
    if prepared is None or prepared.resize != "stretch" or images is None or not Path(images).is_dir():
        return ""
    return f" (stretched to {prepared.size[0]} x {prepared.size[1]})"


def _samples(
    known: Facts, runners: Sequence[Runner], options: EvaluateOptions
) -> tuple[Prepared, dict[str, NDArray[Any]]]:
    """The samples, and what of each the network takes besides its image, by input."""
    from gmconv.data import load_samples, trained_on
    from runtime.evaluate.prepared import prepare

    reference, images = runners[0], options.images or "digits"
    several = len(reference.inputs) > 1
    arrays = several or not is_image(image_input(reference))
    if str(images) == "digits" and trained_on(known.dataset) is None and not arrays:
        raise RefusedError(
            f"{reference.artefact.path}: nothing says that it was trained on digits, so they say nothing of it; give "
            f"--data DIR with a sub-folder of images per class, or --data FILE.npz"
        )

    def load(runner: Runner, about: Facts) -> Samples:
        shape = sample_shape(runner, about, images)
        return load_samples(
            sample_array(runner, Path(images)) if arrays else images,
            input_shape=shape,
            preprocessing=about.preprocessing,
            dataset=known.dataset,
            class_names=known.labels,
            limit=options.limit,
            seed=options.seed,
            part=options.part,
        )

    prepared = prepare(load, runners, known, images)
    samples = prepared.views[0]
    if options.metric is None or Path(images).is_dir():  # of a file a metric is given every array as it is
        samples.judged()
    if samples.part == "changed":
        raise RefusedError(
            f"{images}: the network was trained on a random part of it, and it has changed since, so which images were "
            f"held out is not known: restore it, give others, or say --split all, which counts training images too"
        )
    if options.labelled and _unlabelled(samples, options):
        raise RefusedError(f"{images} has no labels, so --max-drop cannot be judged; use --min-agreement")
    return prepared, other_inputs(reference, samples.targets(), images) if several else {}
