"""The samples of an evaluation as each artefact is served them: by its own preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from pathlib import Path

from gmconv.classes import composed
from gmconv.data import Batch, Floats, Samples
from gmconv.errors import RefusedError
from gmconv.preprocessing import Preprocessing, differences
from runtime.artefact import Facts
from runtime.runners.base import Runner


@dataclass(frozen=True, slots=True)
class Prepared:
    """The same samples in every way that they are prepared: `views`, the reference's first, and the one `of` each
    runner. `warnings` say what differs."""

    views: tuple[Samples, ...]
    of: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    def batches(self, size: int) -> Iterator[tuple[Batch, list[Floats]]]:
        """Batches as the reference takes them, and the images alone as each runner does."""
        for parts in zip(*(view.batches(size) for view in self.views), strict=True):
            yield parts[0], [parts[index].images for index in self.of]


def prepare(
    load: Callable[[Runner, Facts], Samples], runners: Sequence[Runner], known: Facts, data: str | Path
) -> Prepared:
    """Load samples for `runners`, the reference first, once for each preprocessing among them.

    Args:
        load: what loads them for one runner, from what is known of its data.
        known: of all of them: what one does not say itself; the reference's where that says something.
        data: where the samples come from.

    Raises RefusedError, as `load` does, and where they cannot be prepared in several ways, or not for the same masks,
    or where folders are classes and the artefacts call those otherwise.
    """
    ways: list[Preprocessing | None] = []
    views: list[Samples] = []
    of = []
    warnings: dict[str, None] = {}
    for runner in runners:
        about = runner.artefact.facts | known
        way, usual = about.preprocessing, ways[0] if ways else None
        index = next((i for i, one in enumerate(ways) if not (way and one and differences(way, one))), len(ways))
        if way and usual and index:
            warnings[_told(runner, runners[0], way, usual, views[0], data)] = None
        if index == len(ways):
            ways.append(way)
            views.append(load(runner, about).images_alone() if views else load(runner, about))
        of.append(index)
    if views[0].classes:
        _refuse_other_names(runners)
    return Prepared(tuple(views), tuple(of), tuple(warnings))


def _told(
    runner: Runner, reference: Runner, way: Preprocessing, usual: Preprocessing, samples: Samples, data: str | Path
) -> str:
    """What differs, as a warning. Raises RefusedError where it cannot be heeded."""
    name, other = runner.artefact.path.name, reference.artefact.path.name
    differs = f"{name} is served with other preprocessing than {other}: {differences(way, usual)}"
    if str(data) != "digits" and not Path(data).is_dir():
        raise RefusedError(
            f"{differs}; the inputs in {data} are prepared already and can be right for one of them alone: give "
            f"--data DIR of image files, or export again with the right one"
        )
    geometry = replace(usual, size=way.size, resize=way.resize, crop_ratio=way.crop_ratio)
    if samples.masked and differences(geometry, usual):
        raise RefusedError(
            f"{differs}; masks are cut as their images are, and cannot be compared: give --reference FILE that cuts "
            f"them alike, or export again with the right one"
        )
    return f"{differs}; each was judged on images prepared as it is served"


def _refuse_other_names(runners: Sequence[Runner]) -> None:
    """A folder's name says which class its images are, so artefacts that disagree about names cannot share samples."""
    named = [one.artefact for one in runners if one.artefact.facts.labels]
    for usual, other in pairwise(named):
        pairs = enumerate(zip_longest(usual.facts.labels or (), other.facts.labels or ()))
        if unlike := [(index, *pair) for index, pair in pairs if composed(pair[0] or "") != composed(pair[1] or "")]:
            index, name, own = unlike[0]
            raise RefusedError(
                f"{other.path.name} calls class {index} {own!r}, and {usual.path.name} {name!r}: images in folders of "
                f"classes would be right for one of them alone; evaluate each by itself, or export again with the "
                f"right --labels"
            )
