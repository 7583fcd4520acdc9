"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gmconv.errors import RefusedError, UnavailableError
from runtime import cuda, trt
from runtime.manifest import Manifest, ShapeRange, TensorSpec, read_manifest
from runtime.runners.base import Array, LayerTime, Query, Runner, validate_feeds
from runtime.runners.lane import Lane, Origin, Shapes, collect_layer_times


class TensorRTRunner(Runner):
    """A `.plan` on one GPU. Device and page-locked buffers, streams and graphs are made once and reused.

    `run` may be called from several threads; the calls take turns. With `cuda_graph` the second call in a row of the
    same shapes is recorded and launched from then on (TensorRT-RTX records by itself).

    Raises on opening:
        RefusedError: the file is not the one its manifest describes, or was built by another TensorRT or for another
            GPU; the bytes have not reached TensorRT then.
        UnavailableError: no driver, no such GPU, or a library is missing.
    """

    def __init__(self, path: Path, device: str = "cuda:0", *, cuda_graph: bool = True) -> None:
        manifest, plan = read_engine(path)
        flavor = trt.engine_flavor(manifest)
        info = cuda.device_info(cuda.device_index(device))
        self._api: ModuleType = trt.api(flavor)
        refuse_misfit(path, manifest, flavor, trt.version(self._api), info)
        self.device = f"cuda:{info.index}"
        self.manifest = manifest
        self._flavor = flavor
        self._info = info
        self._cuda_graph = cuda_graph
        self._lock = threading.RLock()
        self._lanes: list[Lane] = []
        self._log = trt.Log(self._api)
        self._gpu = cuda.Device(info.index)
        self._runtime: trt.Runtime | None = None
        self._engine: trt.ICudaEngine | None = None
        try:
            with self._gpu.current():
                loads_itself = bool(manifest.build.get("version_compatible"))
                self._runtime, self._engine = trt.deserialize(
                    self._api, self._log, plan, str(path), version_compatible=loads_itself
                )
                del plan
                self._read_tensors(path)
                self._lane(cuda_graph)  # the first is `run`'s
        except BaseException:
            self.close()
            raise
        graphs = "CUDA graphs" if cuda_graph else "no CUDA graphs"
        self.name = f"{trt.TITLES[flavor].lower()} {trt.version(self._api)}, {graphs}"

    def _read_tensors(self, path: Path) -> None:
        engine: trt.ICudaEngine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        found = {
            name: (trt.dtype_name(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
            for name in names
        }
        wanted = {
            s.name: (s.dtype, tuple(d if isinstance(d, int) else -1 for d in s.shape))
            for s in (*self.manifest.inputs, *self.manifest.outputs)
        }
        if not all(name in found and _agree(found[name], spec) for name, spec in wanted.items()) or len(found) != len(
            wanted
        ):
            raise RefusedError(f"{path}: the engine has tensors {found}, its manifest says {wanted}; build it again")
        self.inputs: tuple[TensorSpec, ...] = self.manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = self.manifest.outputs
        inputs = [name for name in names if modes[name] == self._api.TensorIOMode.INPUT]
        self.profiles: tuple[dict[str, ShapeRange], ...] = tuple(
            {n: ShapeRange(*(tuple(side) for side in engine.get_tensor_profile_shape(n, i))) for n in inputs}
            for i in range(engine.num_optimization_profiles)
        )

    def _lane(self, cuda_graph: bool, stream: Any = None) -> Lane:
        engine: trt.ICudaEngine = self._engine
        context: trt.IExecutionContext | None
        if self._flavor == "rtx":
            context = rtx_context(self._api, engine, cuda_graph)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise UnavailableError(
                f"no execution context: {'; '.join(self._log.errors()) or 'TensorRT gave no reason'}"
            )
        # TensorRT-RTX records and launches graphs itself.
        graphs = cuda_graph and self._flavor != "rtx"
        lane = Lane(self._gpu, context, self.inputs, self.outputs, self._log, graphs=graphs, stream=stream)
        self._lanes.append(lane)
        return lane

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; the outputs are copies, so that the buffers can be used again."""
        validate_feeds(self.inputs, feeds, self.profiles)
        with self._lock, self._open().current():
            lane = self._lanes[0]
            self._load(lane, feeds)
            lane.infer(self._cuda_graph)
            return {name: lane.buffers.host(name).copy() for name in lane.outputs}

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
                origin = origin or Origin(self._gpu, lane.stream)
                beside = (self._gpu.stream(), self._gpu.stream())
                for number, turn in enumerate(rounds):
                    if number and cuda_graph and self._flavor == "rtx":
                        # Its own graph is tied to one set of addresses, and so is a context then.
                        lane = self._lane(cuda_graph, lane.stream)
                    self._load(lane, feeds)
                    turn.append(lane.query(origin, beside, transfers=transfers, cuda_graph=cuda_graph, spin=spin))
        return [query for turn in rounds for query in turn]

    def layer_times(self, feeds: Mapping[str, Array], runs: int) -> list[LayerTime] | None:
        """Per-layer times of `runs` runs by TensorRT's profiler, without CUDA graphs."""
        validate_feeds(self.inputs, feeds, self.profiles)
        with self._lock, self._open().current():
            lane = self._lane(cuda_graph=False)
            self._load(lane, feeds)
            for name in lane.inputs:
                lane.buffers.upload(name, lane.stream)
            return [LayerTime(name, times) for name, times in collect_layer_times(self._api, lane, runs)]

    def layer_info(self) -> dict[str, Any] | None:
        """The engine inspector's JSON."""
        with self._lock, self._open().current():
            info: dict[str, Any] = json.loads(trt.inspect_engine(self._api, self._engine))
        return info

    def settings(self) -> dict[str, Any]:
        """What a timing depends on: versions, GPU, TF32, CUDA graphs."""
        return {
            "flavor": self._flavor,
            "tensorrt": trt.version(self._api),
            "gpu": self._info.name,
            "compute_capability": self._info.compute_capability,
            "driver": self._info.driver,
            "cuda": self._info.cuda,
            "precision": self.manifest.precision,
            "tf32": self.manifest.build.get("tf32"),
            "cuda_graph": self._cuda_graph,
        }

    def device_memory(self) -> int:
        """Bytes of the GPU's memory free now."""
        with self._open().current():
            return self._gpu.memory_free()

    def _open(self) -> cuda.Device:
        if self._engine is None:
            raise RuntimeError("this runner is closed")
        return self._gpu

    def _load(self, lane: Lane, feeds: Mapping[str, Array]) -> None:
        """Shape the lane for `feeds` and copy them into its page-locked buffers."""
        shapes = {name: tuple(feeds[name].shape) for name in lane.inputs}
        lane.prepare(shapes, self._profile_of(shapes))
        for name in lane.inputs:
            np.copyto(lane.buffers.host(name), feeds[name], casting="no")

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
            if self._lanes:
                with self._gpu.current():
                    while self._lanes:
                        self._lanes.pop().close()
            with self._gpu.current():
                self._engine = None
                self._runtime = None


def read_engine(path: Path) -> tuple[Manifest, bytes]:
    """The manifest of an engine and its bytes, the very bytes whose sha256 was checked. Raises RefusedError."""
    manifest = read_manifest(path, verify=False)
    if manifest.artefact.kind != "engine":
        raise RefusedError(f"{path}: its manifest describes an {manifest.artefact.kind} file, not an engine")
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read ({error.strerror})") from error
    found = hashlib.sha256(plan).hexdigest()
    if found != manifest.artefact.sha256:
        raise RefusedError(
            f"{path}: sha256 is {found[:12]}…, its manifest says {manifest.artefact.sha256[:12]}…; the pair is not "
            f"from one build (interrupted, edited or mixed up): build it again"
        )
    return manifest, plan


def refuse_misfit(path: Path, manifest: Manifest, flavor: trt.Flavor, running: str, info: cuda.DeviceInfo) -> None:
    """Raise RefusedError, naming both sides, when this TensorRT or this GPU cannot run the engine."""
    for problem in (trt.version_fits(manifest, flavor, running), trt.gpu_fits(manifest, info.compute_capability)):
        if problem:
            raise RefusedError(f"{path}: {problem}; build it again here with python -m export.tensorrt")


def rtx_context(api: ModuleType, engine: trt.ICudaEngine, cuda_graph: bool) -> trt.IExecutionContext:
    """A context of TensorRT-RTX with kernels compiled for the exact shape at once, not later in the background.

    Otherwise the first calls would run other kernels than the rest, and parity and timings would not be about the
    same thing.
    """
    config: trt.IRuntimeConfig = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
    if cuda_graph:
        config.cuda_graph_strategy = api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    else:
        config.cuda_graph_strategy = api.CudaGraphStrategy.DISABLED
    context: trt.IExecutionContext = engine.create_execution_context(config)
    return context


def _agree(found: tuple[str, tuple[int, ...]], wanted: tuple[str, tuple[int, ...]]) -> bool:
    """Same dtype and rank, and the same size wherever both know it."""
    return (
        found[0] == wanted[0]
        and len(found[1]) == len(wanted[1])
        and all(-1 in (a, b) or a == b for a, b in zip(found[1], wanted[1], strict=True))
    )
