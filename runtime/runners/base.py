"""The `Runner` contract: an artefact opened on one device, ready to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError
from runtime.artefact import Artefact
from runtime.manifest import ShapeRange, TensorSpec
from runtime.records import AxisRange

Array = NDArray[Any]
#: Of an engine's CPU kernels; so many that a machine does nothing but start them are a slip.
Threads = Annotated[int, msgspec.Meta(ge=1, le=1024)]
#: Runs before the ones that a layer profile counts: the first ones load kernels, compile and raise clocks.
PROFILE_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class QueryTimes:
    """One query's clock, in ms from an origin common to all queries of a run (trtexec's --exportTimes fields)."""

    start_enqueue: float
    end_enqueue: float
    start_h2d: float
    end_h2d: float
    start_compute: float
    end_compute: float
    start_d2h: float
    end_d2h: float


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer of the built graph and its time in each profiled run, ms."""

    name: str
    times: tuple[float, ...]


class Query(ABC):
    """One inference on a device with inputs, outputs, stream and events bound: what a GPU benchmark repeats."""

    @abstractmethod
    def enqueue(self) -> None:
        """Put the inference on its stream (transfers included if asked for) and return at once."""

    @abstractmethod
    def wait(self) -> QueryTimes:
        """Block until the last `enqueue` is done; its times."""


class Runner(ABC):
    """An artefact on one device. A context manager; `run` validates its inputs and casts nothing.

    `artefact` is what was opened, with what is known of its data; `name` says engine and mode for
    tables ("onnxruntime cpu, 2 threads"); `device` is "cpu", "cuda:0", ...
    """

    artefact: Artefact
    name: str
    device: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[dict[str, ShapeRange], ...] = ()

    @abstractmethod
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises RefusedError when an input's name, dtype, rank, fixed dim or profile range is wrong, and
        `runtime.cuda.DeviceMemoryError` where a batch does not fit on the GPU and a smaller one may.
        """

    def share(self) -> Runner | None:
        """Another runner on what this one has loaded, for another thread; None: the file must be opened again."""
        return None

    def warm_up(self) -> None:  # noqa: B027 (optional)
        """Do now what the first runs of a server would wait for, where there is such a thing."""

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array] | None:
        """Memory that the next `run` of inputs of these shapes reads without copying them again; None: there is none.

        To be filled in place and handed to `run`; good until this runner's next `stage` or `run`.
        """
        return None

    @property
    def graph_problem(self) -> str | None:
        """Why CUDA graphs that were asked for are not used, once that has shown; None otherwise."""
        return None

    @abstractmethod
    def bind(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """Validate `feeds` once; return a call that runs with them and nothing else, for timing on the host clock."""

    def queries(
        self,
        feeds: Mapping[str, Array],
        count: int,
        *,
        transfers: bool,
        cuda_graph: bool,
        streams: int = 1,
        spin: bool = True,
    ) -> list[Query] | None:
        """`count` queries on each of `streams` streams, CUDA-event clocks; None: the host clock is all there is.

        In the order to enqueue them: one of each stream in turn. Without `spin` a thread that waits for a query sleeps
        (`cudaEventBlockingSync`); with it the driver chooses, and spins while cores are free.
        """
        return None

    def layer_times(self, feeds: Mapping[str, Array], runs: int) -> list[LayerTime] | None:
        """Per-layer times of `runs` runs by the engine's own profiler, apart from any timed run; None: it has none."""
        return None

    def layer_info(self) -> dict[str, Any] | None:
        """The layers as the engine built them, `{"Layers": [...]}` as TensorRT's inspector writes; None: unknown."""
        return None

    def settings(self) -> dict[str, Any]:
        """What a timing depends on and `name` may not say: threads, providers, TF32, versions, ..."""
        return {}

    def close(self) -> None:  # noqa: B027 (optional)
        """Release what the runner holds; idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def validate_feeds(
    specs: tuple[TensorSpec, ...],
    feeds: Mapping[str, Array],
    profiles: tuple[dict[str, ShapeRange], ...] = (),
    ranges: Mapping[str, AxisRange] | None = None,
) -> None:
    """Raise RefusedError unless `feeds` fits `specs` exactly and, with profiles, one of them; `ranges` bound axes."""
    names = {spec.name for spec in specs}
    if set(feeds) != names:
        raise RefusedError(f"inputs given: {sorted(feeds)}; this network takes {sorted(names)}")
    axes: dict[str, int] = {}
    for spec in specs:
        array = feeds[spec.name]
        if array.dtype != numpy_dtype(spec.dtype):
            raise RefusedError(
                f"input {spec.name!r} is {array.dtype}, this network takes {spec.dtype}; convert it first"
            )
        if array.ndim != len(spec.shape):
            raise RefusedError(f"input {spec.name!r} has shape {array.shape}, this network takes {spec.shape}")
        for got, want in zip(array.shape, spec.shape, strict=True):
            if got != (want if isinstance(want, int) else axes.setdefault(want, got)):
                raise RefusedError(f"input {spec.name!r} has shape {array.shape}, this network takes {spec.shape}")
            if got == 0:
                raise RefusedError(f"input {spec.name!r} has shape {array.shape}: an axis of length 0")
    for axis, allowed in (ranges or {}).items():
        if axis in axes and axes[axis] not in allowed:
            raise RefusedError(
                f"{axis} {axes[axis]}: this graph holds for {allowed}, where its network's forward takes the branch "
                f"that was exported"
            )
    if profiles and not any(_inside(profile, feeds) for profile in profiles):
        taken = "; ".join(f"{n} {r.min}..{r.max}" for p in profiles for n, r in p.items())
        shapes = ", ".join(f"{n} {a.shape}" for n, a in feeds.items())
        raise RefusedError(f"shape outside every optimization profile: {shapes}; the engine takes {taken}")


def _inside(profile: Mapping[str, ShapeRange], feeds: Mapping[str, Array]) -> bool:
    return all(
        all(lo <= d <= hi for lo, d, hi in zip(r.min, feeds[name].shape, r.max, strict=True))
        for name, r in profile.items()
        if name in feeds
    )


def as_inputs(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """`feeds` of one network as another's inputs `specs`: by name where the names agree, else by position."""
    named = {spec.name for spec in specs} == feeds.keys()
    return {
        spec.name: (feeds[spec.name] if named else array).astype(numpy_dtype(spec.dtype))
        for spec, array in zip(specs, feeds.values(), strict=True)
    }


def parse_device(device: str) -> tuple[str, int]:
    """ "cpu", "cuda" (also "gpu") or "cuda:N" as kind and index. Raises RefusedError for anything else."""
    kind, _, index = device.partition(":")
    kind = "cuda" if kind == "gpu" else kind
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise RefusedError(f"device {device!r} is unknown; cpu, cuda or cuda:N")
    return kind, int(index or 0)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a TensorSpec dtype name; bfloat16 and float8 names come from ml_dtypes."""
    try:
        dtype: np.dtype[Any] = np.dtype(name)
    except TypeError:
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, name))
    return dtype
