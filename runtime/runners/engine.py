"""An engine deserialized once, for every runner that makes contexts of it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from gmconv.errors import RefusedError, UnavailableError
from runtime import cuda, trt
from runtime.manifest import Manifest, ShapeRange, TensorSpec, read_manifest
from runtime.runners.runtime_cache import RuntimeCache


class OpenEngine:
    """A `.plan` on one GPU: TensorRT's runtime and engine, and the kernels that TensorRT-RTX compiled for it.

    Args:
        force: deserialize although TensorRT-RTX says that the engine is invalid here (it has been seen to err), as
            engines are that were built with --force.
        lazy: let TensorRT-RTX compile kernels for new shapes in the background, and keep them in a file beside the
            engine (`RuntimeCache`); otherwise a new shape waits for its own kernels, the ones that every later run of
            this shape has.

    Raises RefusedError and UnavailableError as `runtime.runners.tensorrt.TensorRTRunner` does.
    """

    def __init__(self, path: Path, device: str, *, force: bool = False, lazy: bool = False) -> None:
        self.path = path
        self.manifest, plan = read_engine(path)
        self.flavor = trt.engine_flavor(self.manifest)
        self.info = engine_gpu(path, self.manifest, device)
        self.api: ModuleType = trt.api(self.flavor)
        refuse_misfit(path, self.manifest, self.flavor, trt.version(self.api), self.info)
        self.log = trt.Log(self.api)
        self.gpu = cuda.open_device(self.info.index)
        self.lazy = lazy
        self.users = 1
        self._turn = threading.Lock()
        self._cache = RuntimeCache(path, keep=lazy) if self.flavor == "rtx" else None
        self._runtime: trt.Runtime | None = None
        self._engine: trt.ICudaEngine | None = None
        try:
            with self.gpu.current():
                self._runtime, self._engine = trt.deserialize(
                    self.api,
                    self.log,
                    plan,
                    str(path),
                    version_compatible=bool(self.manifest.build and self.manifest.build.version_compatible),
                    force=force or bool(self.manifest.build and self.manifest.build.forced),
                )
                self._read_tensors()
        except BaseException:
            self.leave()
            raise

    def _read_tensors(self) -> None:
        engine: trt.ICudaEngine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {
            name: (trt.dtype_name(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
            for name in names
        }
        wanted = {
            s.name: (s.dtype, tuple(d if isinstance(d, int) else -1 for d in s.shape))
            for s in (*self.manifest.inputs, *self.manifest.outputs)
        }
        if found.keys() != wanted.keys() or not all(_agree(found[name], spec) for name, spec in wanted.items()):
            raise RefusedError(
                f"{self.path}: the engine has tensors {found}, its manifest says {wanted}; build it again"
            )
        self.inputs: tuple[TensorSpec, ...] = self.manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = self.manifest.outputs
        inputs = [n for n in names if engine.get_tensor_mode(n) == self.api.TensorIOMode.INPUT]
        self.profiles: tuple[dict[str, ShapeRange], ...] = tuple(
            {n: ShapeRange(*(tuple(side) for side in engine.get_tensor_profile_shape(n, i))) for n in inputs}
            for i in range(engine.num_optimization_profiles)
        )

    @property
    def closed(self) -> bool:
        """Whether every runner has left it."""
        return self._engine is None

    def context(self, cuda_graph: bool) -> tuple[trt.IExecutionContext, Any]:
        """A new execution context, and what must live as long as it. The CUDA context is current.

        Raises UnavailableError with TensorRT's reason.
        """
        engine: trt.ICudaEngine = self._engine
        context: trt.IExecutionContext | None
        config = None
        if self.flavor == "rtx":
            config = rtx_config(self.api, engine, cuda_graph=cuda_graph, lazy=self.lazy)
            if self._cache:
                self._cache.rtx_share(config)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            reason = "; ".join(self.log.errors()) or "TensorRT gave no reason"
            raise UnavailableError(f"{self.path}: no execution context: {reason}")
        return context, config

    def inspect(self) -> str:
        """The engine inspector's JSON. The CUDA context is current."""
        return trt.inspect_engine(self.api, self._engine)

    def keep_kernels(self) -> None:
        """Save what TensorRT-RTX compiled so far, for the next process."""
        if self._cache:
            with self.gpu.current():
                self._cache.rtx_save()

    def join(self) -> OpenEngine:
        """For one more runner, which calls `leave`."""
        with self._turn:
            self.users += 1
        return self

    def leave(self) -> None:
        """One runner less; after the last one the engine goes, then its runtime."""
        with self._turn:
            self.users -= 1
            if self.users or self._runtime is None:
                return
            with contextlib.suppress(cuda.CudaError), self.gpu.current():
                if self._cache:
                    self._cache.rtx_save()
                self._cache = None
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


def engine_gpu(path: Path, manifest: Manifest, device: str) -> cuda.DeviceInfo:
    """The GPU that an engine is to run on. Raises UnavailableError, which names what runs without one."""
    try:
        return cuda.device_info(cuda.device_index(device))
    except UnavailableError:
        problem = cuda.driver_problem()
        if problem is None and device.startswith("cuda"):  # there is a GPU, and another was asked for
            raise
    files = [path.parent / source.file for source in reversed(manifest.chain) if source.kind == "onnx"]  # newest first
    beside = next((f"{file} beside it" for file in files if file.is_file()), "the ONNX file that it was built from")
    why = problem or f"{device!r} is none: say --device cuda:0"
    raise UnavailableError(f"{path}: an engine runs on an NVIDIA GPU, and {why}; {beside} runs on a CPU")


def refuse_misfit(path: Path, manifest: Manifest, flavor: trt.Flavor, running: str, info: cuda.DeviceInfo) -> None:
    """Raise RefusedError, naming both sides, when this TensorRT or this GPU cannot run the engine."""
    for problem in (trt.version_fits(manifest, flavor, running), trt.gpu_fits(manifest, info.compute_capability)):
        if problem:
            raise RefusedError(f"{path}: {problem}; build it again here with python -m export.tensorrt")


def rtx_config(api: ModuleType, engine: trt.ICudaEngine, *, cuda_graph: bool, lazy: bool) -> trt.IRuntimeConfig:
    """How a context of TensorRT-RTX runs.

    Unless `lazy`, kernels are compiled for the exact shape at once: otherwise the first calls would run other kernels
    than the rest, and parity and timings would not be about the same thing.
    """
    config: trt.IRuntimeConfig = engine.create_runtime_config()
    kernels, graphs = api.DynamicShapesKernelSpecializationStrategy, api.CudaGraphStrategy
    config.dynamic_shapes_kernel_specialization_strategy = kernels.LAZY if lazy else kernels.EAGER
    config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if cuda_graph else graphs.DISABLED
    return config


def _agree(found: tuple[str, tuple[int, ...]], wanted: tuple[str, tuple[int, ...]]) -> bool:
    """Same dtype and rank, and the same size wherever both know it."""
    return (
        found[0] == wanted[0]
        and len(found[1]) == len(wanted[1])
        and all(-1 in (a, b) or a == b for a, b in zip(found[1], wanted[1], strict=True))
    )
