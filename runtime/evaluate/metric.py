"""A metric of the user's own: what it is given, what it may return, and how sure the result is.

    def metric(outputs, targets):
        ...

is called once per artefact, and once for a reference that is none of them. `outputs` are all outputs of the network by
name, `targets` what is known of the samples by name: `labels` (N,) of a folder with a sub-folder per class, `masks`
(N, H, W) of one with images and masks, and of an .npz file every array but the images. All are numpy arrays with one
row per sample. It returns one number per sample, shape (N,), whose mean is shown with a bootstrap interval (Wilson's
where all are 0 or 1), or one number for all of them, shown without. Larger is better.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmconv.data import Batch
from gmconv.errors import RefusedError, printable, raised_words
from gmconv.packages import find_own
from runtime.evaluate.accuracy import Cell, decibels, snr_db, wilson
from runtime.evaluate.bootstrap import Estimate, bootstrap

Array = NDArray[Any]
Metric = Callable[[dict[str, Array], dict[str, Array]], Any]


def load_metric(spec: str) -> Metric:
    """The function that `package.module:function` names, from Python's path or the working directory.

    Raises RefusedError.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise RefusedError(f"--metric {printable(spec)}: is not package.module:function, for example metrics:mean_ap")
    find_own(module, name, "--metric")
    try:
        with contextlib.chdir("."):  # which it may change
            found = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # somebody's own code
        raise RefusedError(f"--metric {printable(spec)}: {module} does not import ({raised_words(error)})") from error
    metric = getattr(found, name, None)
    if not callable(metric):
        own = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise RefusedError(f"--metric {printable(spec)}: {module} has no function {name!r}; it has {', '.join(own)}")
    return metric  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricScore:
    """One artefact by a user's metric: its value, and how much less than the reference's it is (paired).

    `snr_db` is the least of all outputs, `output` whose it is; "" of one output.
    """

    samples: int
    metric: str
    value: Estimate
    drop: Estimate
    snr_db: float
    output: str = ""
    agreement: None = None

    @property
    def lost(self) -> float:
        """How much the reference has more."""
        return self.drop.value

    def cells(self) -> list[Cell]:
        """For tables."""
        interval = " [95%]" if self.value.interval else ""
        return [
            Cell(f"{self.metric} (metric){interval}", 0, self.value.shown(1, ".4g")),
            Cell(f"drop{interval}", 1, self.drop.shown(1, ".3g")),
            Cell("SNR [dB]", 2, f"{decibels(self.snr_db)} {self.output}".rstrip()),
        ]

    def remarks(self, labels: Sequence[str]) -> list[str]:
        """None: what it means is the user's."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite ratio becomes None."""
        snr = self.snr_db if np.isfinite(self.snr_db) else None
        found = {"samples": self.samples, "metric": self.metric, "snr_db": snr, "snr_output": self.output}
        return found | {"value": self.value.to_dict(), "drop": self.drop.to_dict()}


@dataclass(slots=True)
class MetricJudge:
    """Collects all outputs, of the reference (first) and of each artefact, in memory; then asks the metric."""

    metric: Metric
    name: str
    targets: dict[str, Array]
    _outputs: list[list[dict[str, Array]]] = field(default_factory=list)
    _count: int = 0

    def add(self, outputs: Sequence[dict[str, Array]], batch: Batch) -> None:
        """One batch: each runner's outputs, the reference's first."""
        self._outputs.append(list(outputs))
        self._count += len(batch.images)

    def scores(self) -> list[MetricScore]:
        """One score per runner, in the order of `add`'s outputs; two of the same outputs are one artefact."""
        runs = [(id(parts[0]), parts) for parts in zip(*self._outputs, strict=True)]
        found = {key: {n: np.concatenate([part[n] for part in parts]) for n in parts[0]} for key, parts in runs}
        reference = found[runs[0][0]]
        ratios = {  # before the metric, which may write into what it is given
            key: {name: snr_db(array, outputs[name]) for name, array in reference.items()}
            for key, outputs in found.items()
        }
        values = {key: self._values(outputs) for key, outputs in found.items()}
        before = values[runs[0][0]]
        return [self._score(values[key], before, ratios[key]) for key, _ in runs]

    def _values(self, outputs: dict[str, Array]) -> NDArray[np.float64]:
        """One value, or one per sample."""
        try:
            with contextlib.chdir("."):
                given = self.metric(dict(outputs), {name: array.copy() for name, array in self.targets.items()})
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # somebody's own code
            raise RefusedError(
                f"--metric {self.name} failed: {raised_words(error)}; it was given outputs {_shapes(outputs)} and "
                f"targets {_shapes(self.targets) or 'none'}"
            ) from error
        found = _numbers(given)
        if found is None or found.shape not in ((), (self._count,)):
            raise RefusedError(
                f"--metric {self.name} returned {_described(given, found)}; it has to return one number, or one for "
                f"each of {self._count} samples"
            )
        if not np.isfinite(found).all():
            where = f" for sample {int(np.flatnonzero(~np.isfinite(found))[0])}" if found.ndim else ""
            raise RefusedError(f"--metric {self.name} returned NaN or infinity{where}; return a number")
        return found

    def _score(self, own: NDArray[np.float64], before: NDArray[np.float64], ratios: dict[str, float]) -> MetricScore:
        if own.ndim:

            def statistics(weights: NDArray[np.float64]) -> NDArray[np.float64]:
                return np.array([weights @ own, weights @ (before - own)]) / float(weights.sum())

            value, drop = bootstrap(len(own), statistics)
            if np.isin(own, (0, 1)).all():
                value = replace(value, interval=wilson(int(own.sum()), len(own)))
        else:
            value, drop = Estimate(float(own)), Estimate(float(before - own))
        worst = min(ratios, key=ratios.__getitem__)
        return MetricScore(
            samples=self._count,
            metric=self.name,
            value=value,
            drop=drop,
            snr_db=ratios[worst],
            output=worst if len(ratios) > 1 else "",
        )


def _numbers(given: Any) -> NDArray[np.float64] | None:
    """What a metric returned as numbers; None where it is something else (numpy takes None and "1" for numbers)."""
    try:
        found = np.asarray(given)
        return found.astype(np.float64) if found.dtype.kind in "biuf" else None
    except Exception:  # a ragged list, a tensor on a GPU
        return None


def _described(given: Any, found: NDArray[np.float64] | None) -> str:
    """What was returned instead of numbers: its shape, or what it is."""
    if found is not None:
        return f"numbers of shape {found.shape}"
    return f"{type(given).__name__} {printable(repr(given))}"


def _shapes(arrays: dict[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
