"""The TensorRT boundary: the only file that imports `tensorrt` or `tensorrt_rtx`.

TensorRT (10.13 to 11) and TensorRT for RTX share one Python API. Other files get the module from `api()` as `api` and
annotate what it makes with the names re-exported here (`trt.Builder`), which exist for the reader, the type checker
and tests/runtime/test_trt_surface.py: that test checks each use against the real bindings of every supported version.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from gmconv.errors import RefusedError, UnavailableError
from gmconv.packages import install, pip
from runtime import cuda

if TYPE_CHECKING:
    from tensorrt import Builder as Builder
    from tensorrt import EngineInspector as EngineInspector
    from tensorrt import IBuilderConfig as IBuilderConfig
    from tensorrt import ICudaEngine as ICudaEngine
    from tensorrt import IExecutionContext as IExecutionContext
    from tensorrt import IHostMemory as IHostMemory
    from tensorrt import ILayer as ILayer
    from tensorrt import ILogger as ILogger
    from tensorrt import INetworkDefinition as INetworkDefinition
    from tensorrt import IOptimizationProfile as IOptimizationProfile
    from tensorrt import IProgressMonitor as IProgressMonitor
    from tensorrt import IRuntimeCache as IRuntimeCache
    from tensorrt import IRuntimeConfig as IRuntimeConfig
    from tensorrt import ITensor as ITensor
    from tensorrt import ITimingCache as ITimingCache
    from tensorrt import OnnxParser as OnnxParser
    from tensorrt import ParserError as ParserError
    from tensorrt import Runtime as Runtime

    from runtime.manifest import Manifest

Flavor = Literal["tensorrt", "rtx"]
MODULES: dict[Flavor, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
TITLES: dict[Flavor, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
# The key in a manifest's `versions`.
VERSION_KEYS: dict[Flavor, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
OLDEST: dict[Flavor, tuple[int, int]] = {"tensorrt": (10, 13), "rtx": (1, 2)}

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
    "FP8": "float8_e4m3fn",
}


def api(flavor: Flavor) -> ModuleType:
    """The Python module of `flavor`. Raises UnavailableError when it is missing, does not load, or is too old."""
    name = MODULES[flavor]
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        reason = f"is installed but does not load ({error})" if installed(flavor) else "is not installed"
        raise UnavailableError(f"{TITLES[flavor]} {reason}: {install(flavor)}") from error
    found = version(module)
    if version_tuple(found)[:2] < OLDEST[flavor]:
        need = ".".join(map(str, OLDEST[flavor]))
        raise UnavailableError(f"{TITLES[flavor]} {found} is too old, {need} or later is needed: {pip('-U', name)}")
    return module


def installed(flavor: Flavor) -> bool:
    """Whether the Python package of `flavor` is on this machine (it may still fail to load)."""
    return importlib.util.find_spec(MODULES[flavor]) is not None


def version(module: ModuleType) -> str:
    """The version string of a module that `api` returned."""
    return str(module.__version__)


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading integers of a version: "10.13.3.9.post1" -> (10, 13, 3, 9)."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def choose_flavor(asked: Literal["auto", "tensorrt", "rtx"]) -> tuple[Flavor, str]:
    """The flavor that can build here, and why, in words. Raises UnavailableError when the asked one cannot."""
    problem = cuda.driver_problem()
    if asked == "rtx":
        if not installed("rtx"):
            raise UnavailableError(f"TensorRT-RTX is not installed: {install('rtx')}")
        return "rtx", "it was asked for"
    if asked == "tensorrt":
        if not installed("tensorrt"):
            raise UnavailableError(f"TensorRT is not installed: {install('tensorrt')}; or --flavor rtx")
        if problem:
            raise UnavailableError(
                f"TensorRT builds engines on the GPU they run on, and {problem}; --flavor rtx needs none"
            )
        return "tensorrt", "it was asked for"
    if installed("tensorrt") and not problem:
        return "tensorrt", "TensorRT is installed and there is a GPU"
    if not installed("rtx"):
        lacking = f"TensorRT cannot build here ({problem})" if installed("tensorrt") else "TensorRT is not installed"
        raise UnavailableError(f"{lacking} and TensorRT-RTX is not installed: {install('rtx')}")
    return "rtx", f"TensorRT cannot build here ({problem})" if installed("tensorrt") else "TensorRT is not installed"


_KEPT_RECORDS = 1000
_KEPT_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING")
# How the record begins in which a builder lists, at VERBOSE, the layers of the engine it made.
_LAYER_LIST = ("Layers:", "Engine Layer Information:")


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line of TensorRT's log: severity "INTERNAL_ERROR", "ERROR", "WARNING", "INFO" or "VERBOSE"."""

    severity: str
    message: str


class Log:
    """Collects TensorRT's log. Hand `.logger` to TensorRT; keep this object as long as what was made with it.

    Kept are the newest warnings and errors, and the list of the layers that a builder made; the rest, thousands of
    lines a build and some at every inference, only passes through `sink`.
    """

    def __init__(self, api: ModuleType, sink: Callable[[LogRecord], None] | None = None) -> None:
        self.records: deque[LogRecord] = deque(maxlen=_KEPT_RECORDS)
        self.layers = ""
        self.sink = sink
        collect = self._add

        class Logger(api.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                api.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                collect(severity.name, message)

        self.logger: ILogger = Logger()

    def _add(self, severity: str, message: str) -> None:
        if severity in _KEPT_SEVERITIES:
            self.records.append(LogRecord(severity, message))
        elif message.startswith(_LAYER_LIST):
            self.layers = message
        if self.sink:
            self.sink(LogRecord(severity, message))

    def errors(self) -> list[str]:
        """What went wrong, in TensorRT's words, oldest first, without repeats."""
        lines = [r.message.strip() for r in list(self.records) if r.severity != "WARNING"]
        return list(dict.fromkeys(lines))

    def warnings(self) -> list[str]:
        """TensorRT's warnings, oldest first, without repeats."""
        return list(dict.fromkeys(r.message.strip() for r in list(self.records) if r.severity == "WARNING"))


def dtype_name(dtype: Any) -> str:
    """numpy's name for a TensorRT DataType (`ml_dtypes`' where numpy has none)."""
    name: str = dtype.name
    return DTYPES.get(name, name.lower())


def gpu_fits(manifest: Manifest, gpu: str) -> str | None:
    """Why an engine with this manifest cannot run on compute capability `gpu` ("8.9"), or None when it may."""
    build, have = manifest.build, version_tuple(gpu)
    if build is not None and build.flavor == "rtx":
        targets = build.compute_capabilities
        if targets and gpu not in targets:
            return f"it was built for compute capability {', '.join(targets)}, this GPU is {gpu}"
        # The documentation lists 8.0, 8.6, 8.9, 12.0 and later for default engines; 9.0 is left to TensorRT-RTX.
        return None if targets or have >= (8, 0) else f"TensorRT-RTX engines need 8.0 or later, this GPU is {gpu}"
    device = manifest.device
    if device is None or device.compute_capability in ("", gpu):
        return None
    if build is not None and build.hardware_compatibility == "ampere-plus":
        return None if have >= (8, 0) else f"it was built for compute capability 8.0 and later, this GPU is {gpu}"
    name = device.name or "another GPU"
    return f"it was built on {name}, compute capability {device.compute_capability}, this GPU is {gpu}"


def version_fits(manifest: Manifest, flavor: Flavor, running: str) -> str | None:
    """Why TensorRT `running` cannot load an engine with this manifest, or None when it may."""
    title = TITLES[flavor]
    built = manifest.versions.get(VERSION_KEYS[flavor])
    if built is None:
        return f"its manifest does not say which {title} built it"
    have, want = version_tuple(running), version_tuple(built)
    if have == want:
        return None
    if manifest.build and manifest.build.version_compatible and have[0] == want[0] and have >= want:
        return None
    return f"it was built by {title} {built}, this machine runs {running}"


def engine_flavor(manifest: Manifest) -> Flavor:
    """Which TensorRT built the engine. Raises RefusedError when its manifest does not say."""
    if manifest.build is not None:
        return manifest.build.flavor
    raise RefusedError(
        f"{manifest.artefact.file}: its manifest names no TensorRT flavor; build it again with export.tensorrt"
    )


def deserialize(
    api: ModuleType,
    log: Log,
    plan: bytes | memoryview,
    name: str,
    *,
    version_compatible: bool = False,
    force: bool = False,
) -> tuple[Runtime, ICudaEngine]:
    """The runtime and the engine in `plan`, whose sha256 and compatibility the caller has checked.

    A `version_compatible` plan carries the library that runs it, which TensorRT loads only where that is allowed. What
    TensorRT-RTX calls invalid on this machine is deserialized only with `force`: it has called engines so that ran.

    Raises InvalidEngineError, or UnavailableError with TensorRT's reason when the runtime does not start or the engine
    does not load.
    """
    runtime: Runtime = api.Runtime(log.logger)
    if hasattr(api, "EngineValidity") and not force:  # TensorRT-RTX's alone
        problem = rtx_problem(api, log, runtime, plan)
        if problem:
            raise InvalidEngineError(
                f"{name}: {TITLES['rtx']} {version(api)} {problem}; --force of runtime.parity or export.tensorrt "
                f"tries it all the same"
            )
    if version_compatible:
        runtime.engine_host_code_allowed = True
    engine: ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = "; ".join(log.errors()) or "no reason given"
        raise UnavailableError(f"{name}: TensorRT {version(api)} did not load the engine: {reason}")
    return runtime, engine


class InvalidEngineError(UnavailableError):
    """TensorRT-RTX says that an engine cannot run on this machine, before deserializing it."""


def rtx_problem(api: ModuleType, log: Log, runtime: Runtime, plan: bytes | memoryview) -> str | None:
    """Why TensorRT-RTX calls `plan` invalid on this machine, as a clause; None for a valid or a merely slower one."""
    validity, diagnostics = runtime.get_engine_validity(plan)  # an enum and a sum of flags
    if validity != api.EngineValidity.INVALID:
        return None
    flags = api.EngineInvalidityDiagnostics.__members__.items()
    reasons = [name.lower().replace("_", " ") for name, flag in flags if diagnostics & int(flag)]
    words = ", ".join(reasons) or "; ".join(log.errors()) or "no reason given"
    return f"calls it invalid on this machine ({words})"


def inspect_engine(api: ModuleType, engine: ICudaEngine) -> str:
    """The engine inspector's JSON: detailed when the engine was built so."""
    inspector: EngineInspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(api.LayerInformationFormat.JSON))


def quiet_native_output() -> None:
    """Keep what native libraries write to stdout off it: results go there, logs go to stderr."""
    sys.stdout.flush()
    os.dup2(2, 1)
