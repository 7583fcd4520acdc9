"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime import cuda, trt
from runtime.artefact import Artefact, facts_of
from runtime.manifest import ShapeRange
from runtime.runners.base import Array, LayerTime, Query, Runner, validate_feeds
from runtime.runners.engine import OpenEngine
from runtime.runners.lane import Graphs, Lane, Shapes, collect_layer_times
from runtime.runners.queries import Origin, Streams


class TensorRTRunner(Runner):
    """A `.plan` on one GPU. Device and page-locked buffers, streams and graphs are made once and reused.

    `run` may be called from several threads; the calls take turns. With `cuda_graph` the second call in a row of the
    same shapes is recorded and launched from then on (TensorRT-RTX records by itself); where that does not work it is
    said once, and the work is enqueued as it is.

    Args:
        path: the engine; its manifest lies beside it.
        device: "cuda" or "cuda:N".
        cuda_graph: record and launch.
        batches: batch sizes that `run` pads smaller batches to, each with an execution context and a graph of its own;
            larger ones than the last run as they are. "auto": those of `padded_sizes`. Empty: one context, every size
            as it is.
        force, lazy: see `OpenEngine`.

    Raises on opening:
        RefusedError: the file is not the one its manifest describes, or was built by another TensorRT or for another
            GPU; the bytes have not reached TensorRT then.
        UnavailableError: no driver, no such GPU, a library is missing, or TensorRT does not take the engine.

    Raises on running DeviceMemoryError where a batch does not fit: a smaller one may.
    """

    def __init__(
        self,
        path: Path,
        device: str = "cuda:0",
        *,
        cuda_graph: bool = True,
        batches: Sequence[int] | Literal["auto"] = (),
        force: bool = False,
        lazy: bool = False,
    ) -> None:
        self._begin(OpenEngine(path, device, force=force, lazy=lazy), cuda_graph, batches)

    def _begin(self, engine: OpenEngine, cuda_graph: bool, batches: Sequence[int] | Literal["auto"]) -> None:
        self._engine = engine
        self._gpu = engine.gpu
        self.device = f"cuda:{engine.info.index}"
        self.manifest = engine.manifest
        self.artefact = Artefact(
            path=engine.path,
            kind="engine",
            manifest=engine.manifest,
            facts=facts_of(engine.manifest),
            sha256=engine.manifest.artefact.sha256,
        )
        self.inputs, self.outputs, self.profiles = engine.inputs, engine.outputs, engine.profiles
        sizes = padded_sizes(self.profiles) if batches == "auto" else batches
        self.batches = tuple(sorted(size for size in set(sizes) if self._takes(size)))
        self._cuda_graph = cuda_graph
        self._lock = threading.RLock()
        self._lanes: list[Lane] = []
        self._streams: list[cuda.Stream] = []
        self._events: list[cuda.Event] = []
        self._closed = False
        title = trt.TITLES[engine.flavor].lower()
        self.name = f"{title} {trt.version(engine.api)}, {'CUDA graphs' if cuda_graph else 'no CUDA graphs'}"
        self._graphs = Graphs(self._gpu, str(engine.path))
        try:
            with self._gpu.current():
                self._runs = [self._lane(cuda_graph) for _ in range(max(1, len(self.batches)))]  # newest use last
        except BaseException:
            self.close()
            raise

    def _takes(self, batch: int) -> bool:
        return any(all(r.min[0] <= batch <= r.max[0] for r in profile.values()) for profile in self.profiles)

    def share(self) -> TensorRTRunner:
        """Another runner of the same deserialized engine, with contexts and buffers of its own: for another thread."""
        twin = object.__new__(type(self))
        twin._begin(self._engine.join(), self._cuda_graph, self.batches)
        return twin

    def _lane(self, cuda_graph: bool, stream: cuda.Stream | None = None) -> Lane:
        context, config = self._engine.context(cuda_graph)
        # TensorRT-RTX records and launches graphs itself.
        graphs = self._graphs if self._engine.flavor != "rtx" else None
        engine = self._engine
        lane = Lane(
            self._gpu, context, self.inputs, self.outputs, engine.log, graphs=graphs, stream=stream, config=config
        )
        self._lanes.append(lane)
        return lane

    @property
    def graph_problem(self) -> str | None:
        """Why CUDA graphs do not work here, once that has shown."""
        return self._graphs.problem

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        """The page-locked memory that the next `run` of these shapes uploads from, to be filled in place.

        Hand the very arrays to `run`. They are good until the next `stage` or `run` of this runner.
        """
        with self._lock, self._open().current():
            lane, rows = self._prepared(shapes)
            return {name: _rows(lane.buffers.host(name), rows) for name in lane.inputs}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; the outputs are copies, so that the buffers can be used again."""
        validate_feeds(self.inputs, feeds, self.profiles)
        with self._lock, self._open().current():
            lane, rows = self._prepared({name: tuple(feeds[name].shape) for name in feeds})
            _fill(lane, feeds, rows)
            lane.infer(self._cuda_graph)
            return {name: _rows(lane.buffers.host(name), rows).copy() for name in lane.outputs}

    def _prepared(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Lane, int | None]:
        """A lane ready for `shapes`, padded to the next of `batches`; and the rows that are not padding, if any is."""
        wanted, rows = dict(shapes), None
        if self.batches and self._batched():
            given = shapes[self.inputs[0].name][0]
            padded = next((size for size in self.batches if size >= given), given)
            if padded != given:
                wanted, rows = {name: (padded, *shape[1:]) for name, shape in shapes.items()}, given
        lane = next((lane for lane in self._runs if lane.prepared == wanted), self._runs[0])
        lane.prepare(wanted, self._profile_of(wanted))
        self._runs.remove(lane)
        self._runs.append(lane)
        return lane, rows

    def _batched(self) -> bool:
        first = self.inputs[0].shape[:1]
        return isinstance(next(iter(first), None), str) and all(
            spec.shape[:1] == first for spec in (*self.inputs, *self.outputs)
        )

    def warm_up(self) -> None:
        """Run every size of `batches` (each profile's tuned shape without them) until its graph is recorded.

        What TensorRT-RTX compiled for them is saved for the next process.
        """
        for profile in self.profiles:
            shapes = [{name: r.opt for name, r in profile.items()}]
            if self.batches and self._batched():
                sizes = [n for n in self.batches if all(r.min[0] <= n <= r.max[0] for r in profile.values())]
                shapes = [{name: (size, *r.opt[1:]) for name, r in profile.items()} for size in sizes]
            for shape in shapes:
                for _ in range(2):
                    staged = self.stage(shape)
                    for array in staged.values():
                        array[...] = 0
                    self.run(staged)
        self._engine.keep_kernels()

    def bind(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """A call that uploads, runs, downloads and waits: no check, no allocation and no copy on the host.

        It returns the outputs in the page-locked buffers, which the next call overwrites. It has an execution context
        of its own and lives as long as the runner.
        """
        validate_feeds(self.inputs, feeds, self.profiles)
        gpu, cuda_graph = self._open(), self._cuda_graph
        with self._lock, gpu.current():
            lane = self._lane(cuda_graph)
            self._load(lane, feeds)
            lane.infer(cuda_graph)
            lane.infer(cuda_graph)  # records the graph
        outputs = {name: lane.buffers.host(name) for name in lane.outputs}

        def call() -> dict[str, Array]:
            with gpu.current():
                lane.infer(cuda_graph)
            return outputs

        return call

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
        """`count` queries on each of `streams` streams, in the order to enqueue them: one of each stream in turn.

        As in trtexec each stream has an execution context, and uploads and downloads have streams of their own.
        """
        validate_feeds(self.inputs, feeds, self.profiles)
        with self._lock, self._open().current():
            rounds: list[list[Query]] = [[] for _ in range(count)]
            origin: Origin | None = None
            for _ in range(streams):
                lane = self._lane(cuda_graph)
                if origin is None:
                    self._events.append(self._gpu.event())
                    origin = Origin(self._events[-1], lane.stream)
                beside = [self._gpu.stream(), self._gpu.stream()]
                self._streams += beside
                for number, turn in enumerate(rounds):
                    if number and cuda_graph and self._engine.flavor == "rtx":
                        # Its own graph is tied to one set of addresses, and so is a context then.
                        lane = self._lane(cuda_graph, lane.stream)
                    self._load(lane, feeds)
                    order = Streams(beside[0], lane.stream, beside[1])
                    turn.append(lane.query(origin, order, transfers=transfers, cuda_graph=cuda_graph, spin=spin))
        return [query for turn in rounds for query in turn]

    def layer_times(self, feeds: Mapping[str, Array], runs: int) -> list[LayerTime] | None:
        """Per-layer times of `runs` runs by TensorRT's profiler, without CUDA graphs."""
        validate_feeds(self.inputs, feeds, self.profiles)
        with self._lock, self._open().current():
            lane = self._lane(cuda_graph=False)
            try:
                self._load(lane, feeds)
                for name in lane.inputs:
                    lane.buffers.upload(name, lane.stream)
                return [LayerTime(name, times) for name, times in collect_layer_times(self._engine.api, lane, runs)]
            finally:
                self._lanes.remove(lane)
                lane.close()

    def layer_info(self) -> dict[str, Any] | None:
        """The engine inspector's JSON."""
        with self._lock, self._open().current():
            info: dict[str, Any] = json.loads(self._engine.inspect())
        return info

    def settings(self) -> dict[str, Any]:
        """What a timing depends on: versions, GPU, TF32, CUDA graphs."""
        info = self._engine.info
        return {
            "flavor": self._engine.flavor,
            "tensorrt": trt.version(self._engine.api),
            "gpu": info.name,
            "compute_capability": info.compute_capability,
            "driver": info.driver,
            "cuda": info.cuda,
            "cuda_driver_package": self._gpu.driver,
            "precision": self.manifest.precision,
            "tf32": self.manifest.build.tf32 if self.manifest.build else None,
            "cuda_graph": self._cuda_graph,
        }

    def device_memory(self) -> int:
        """Bytes of the GPU's memory free now."""
        with self._open().current():
            return self._gpu.memory()[0]

    def _open(self) -> cuda.Device:
        if self._closed:
            raise RuntimeError("this runner is closed")
        return self._gpu

    def _load(self, lane: Lane, feeds: Mapping[str, Array]) -> None:
        """Shape the lane for `feeds` and copy them into its page-locked buffers."""
        shapes = {name: tuple(feeds[name].shape) for name in lane.inputs}
        lane.prepare(shapes, self._profile_of(shapes))
        _fill(lane, feeds, None)

    def _profile_of(self, shapes: Shapes) -> int:
        """The profile that holds these shapes and is tuned for the nearest ones."""
        distances = {}
        for index, profile in enumerate(self.profiles):
            if all(
                low <= d <= high
                for name, r in profile.items()
                for low, d, high in zip(r.min, shapes[name], r.max, strict=True)
            ):
                distances[index] = sum(
                    abs(d - opt) for name, r in profile.items() for d, opt in zip(shapes[name], r.opt, strict=True)
                )
        return min(distances, key=lambda index: distances[index], default=0)

    def close(self) -> None:
        """Graphs, contexts, buffers, then the engine, then the runtime; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(cuda.CudaError), self._gpu.current():
                while self._lanes:
                    self._lanes.pop().close()
                for stream in self._streams:
                    stream.close()
                for event in self._events:
                    event.close()
            self._engine.leave()


def padded_sizes(profiles: Sequence[Mapping[str, ShapeRange]]) -> tuple[int, ...]:
    """A few batch sizes for serving: what each profile is made for, and powers of two between.

    Each costs the memory of an execution context: where there would be more than eight powers of two, powers of four.
    """
    ranges = [r for profile in profiles for r in profile.values() if r.min]
    if not ranges:
        return ()
    low, high = min(r.min[0] for r in ranges), max(r.max[0] for r in ranges)
    powers = [1 << bit for bit in range(high.bit_length())]
    if len(powers) > 8:
        powers = powers[::2]
    return tuple(sorted({low, high, *(r.opt[0] for r in ranges), *(p for p in powers if low <= p <= high)}))


def _rows(array: Array, rows: int | None) -> Array:
    return array if rows is None else array[:rows]


def _fill(lane: Lane, feeds: Mapping[str, Array], rows: int | None) -> None:
    """Copy the feeds into the lane's page-locked buffers, unless they lie there already (`TensorRTRunner.stage`)."""
    for name in lane.inputs:
        target, source = _rows(lane.buffers.host(name), rows), feeds[name]
        if target.__array_interface__["data"] != source.__array_interface__["data"]:
            np.copyto(target, source, casting="no")
