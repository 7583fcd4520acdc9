"""The process that holds TensorRT's builder: `python -m export.tensorrt.worker FD`, the request as JSON on stdin.

The native library stays out of the user's process: whatever kills it (bad bytes, a compiler crash, the memory limit,
Ctrl-C in the middle of a long native call) ends this process alone, and its peak memory is the build's. Messages go
to the pipe FD, one JSON object a line: {"phase": ...} while it works, then {"result": ...} or {"error": ...}.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from export.tensorrt import write
from export.tensorrt.profiles import NetworkInput, from_json, resolve_profiles
from gmconv.errors import BuildError, RefusedError, UnavailableError
from runtime import trt
from runtime.cuda import driver_problem

Emit = Callable[[dict[str, Any]], None]
_STACK = 64 << 20
_PR_SET_PDEATHSIG = 1  # Linux: a killed parent takes this process with it
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}


def main() -> None:
    """Read one request, build, report; never a traceback for an expected failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    trt.quiet_native_output()
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as pipe:
        turn = threading.Lock()  # the builder may report progress from several threads

        def emit(message: dict[str, Any]) -> None:
            with turn:
                pipe.write(json.dumps(message) + "\n")

        preload()
        text = sys.stdin.read()
        if not text:
            return  # the parent had nothing to build
        # A thread has a heap of its own, at the same address whatever this process allocated before: the lengths of
        # paths and of the environment do not reach the order in which TensorRT walks its pointers. No collection
        # moves anything there, and no other thread runs.
        gc.disable()
        threading.stack_size(_STACK)  # a thread's may be smaller than the main one's
        thread = threading.Thread(target=serve, args=(json.loads(text), emit))
        thread.start()
        thread.join()


def serve(request: Mapping[str, Any], emit: Emit) -> None:
    """Build, report; a bug ends the process with its traceback."""
    try:
        try:
            emit({"result": build(request, emit)})
        except BuildFailure as failure:
            emit({"error": failure.to_dict()})
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def preload() -> None:
    """Load TensorRT while the request is being written, where it is clear which."""
    found = [flavor for flavor in trt.MODULES if trt.installed(flavor)]
    if len(found) == 1:
        with contextlib.suppress(UnavailableError):
            trt.api(found[0])


class NodesRefusedError(RefusedError):
    """The parser refused these nodes: each with keys node, op and reason."""

    def __init__(self, nodes: list[dict[str, str]]) -> None:
        super().__init__("TensorRT cannot parse the model")
        self.nodes = nodes


class BuildFailure(Exception):  # noqa: N818 (it crosses a process, it is not raised at users)
    """An expected failure with TensorRT's own error lines, as it crosses the pipe."""

    def __init__(self, error: RefusedError | BuildError | UnavailableError, log: list[str]) -> None:
        super().__init__(error.message)
        self.error = error
        self.log = log

    def to_dict(self) -> dict[str, Any]:
        """The message that `export.tensorrt.process` turns back into an error."""
        nodes = self.error.nodes if isinstance(self.error, NodesRefusedError) else []
        return {"exit": self.error.exit_code, "message": self.error.message, "log": self.log, "nodes": nodes}


def build(request: Mapping[str, Any], emit: Emit, api: ModuleType | None = None) -> dict[str, Any]:
    """Parse `request["onnx"]`, build, write `request["plan"]`; what the manifest needs to know about it.

    Raises BuildFailure around RefusedError (profiles, unsupported nodes), BuildError (TensorRT gave up) or
    UnavailableError.
    """
    # The folder of the plan is the parent's; a log file that cannot be opened was refused there.
    log_file = write.LogFile(Path(request["log"])) if request.get("log") else None
    lines: list[str] = []
    try:
        api = api or trt.api(request["flavor"])
        log = trt.Log(api, _sink(log_file, emit if request.get("verbose") else None))
        try:
            built = _build(api, log, request, emit)
        finally:
            lines = log.errors()
        if log_file:
            log_file.check()
        return built
    except (RefusedError, BuildError, UnavailableError) as error:
        raise BuildFailure(error, lines) from error
    finally:
        if log_file:
            log_file.close()


def _build(api: ModuleType, log: trt.Log, request: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    started = time.perf_counter()
    # TensorRT keeps the path that it is given: a bare name has the same length wherever the file lies.
    folder, name = os.path.split(request["onnx"])
    with contextlib.suppress(OSError):  # a path that is not there is the parser's to refuse
        os.chdir(folder)
        request = {**request, "onnx": name}
    builder: trt.Builder | None = api.Builder(log.logger)
    if builder is None:
        raise UnavailableError(f"TensorRT's builder does not start: {'; '.join(log.errors()) or 'no reason given'}")
    network: trt.INetworkDefinition = parse(api, log, builder, request["onnx"], emit)
    described = describe(api, network)
    parsed = time.perf_counter()
    config: trt.IBuilderConfig = builder.create_builder_config()
    configure(api, config, request)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    profiles = add_profiles(builder, config, inputs, request)
    cache = None
    if request.get("timing_cache"):
        from export.tensorrt import timing_cache

        cache = timing_cache.attach(api, config, request["timing_cache"])
    monitor = progress_monitor(api, emit)
    config.progress_monitor = monitor
    emit({"phase": "build", "done": 0, "of": 0})
    serialized: trt.IHostMemory | None = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError("TensorRT could not build the engine")
    built = time.perf_counter()
    warnings = log.warnings()
    if cache:
        timing_cache.save(config, cache)
        warnings += cache.warnings
    emit({"phase": "write", "done": 0, "of": 0})
    sha256 = write.write(serialized, Path(request["plan"]))
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return {
        "network": described,
        "version": trt.version(api),
        "inputs": [_tensor(t) for t in inputs],
        "outputs": [_tensor(t) for t in outputs],
        "profiles": profiles,
        "sha256": sha256,
        "bytes": serialized.nbytes,
        "layers": layer_list(api, log, serialized, version_compatible=request["version_compatible"]),
        "warnings": warnings,
        "timing_cache": cache.summary() if cache else None,
        "seconds": {"parse": round(parsed - started, 3), "build": round(built - parsed, 3)},
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def parse(api: ModuleType, log: trt.Log, builder: trt.Builder, path: str, emit: Emit) -> trt.INetworkDefinition:
    """The network in the ONNX file `path`, strongly typed. Raises RefusedError listing the nodes TensorRT refuses."""
    emit({"phase": "parse", "done": 0, "of": 0})
    network: trt.INetworkDefinition = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: trt.OnnxParser = api.OnnxParser(network, log.logger)
    parsed = parser.parse_from_file(path)
    if not parsed or parser.num_errors:
        raise NodesRefusedError([_parser_error(parser.get_error(i)) for i in range(parser.num_errors)])
    # Random bytes can parse "successfully" into nothing.
    if network.num_layers == 0 or network.num_outputs == 0 or network.num_inputs == 0:
        raise RefusedError(
            f"TensorRT read {network.num_layers} layers, {network.num_inputs} inputs and {network.num_outputs} outputs "
            f"from the model: there is nothing to build"
        )
    return network


def _parser_error(error: trt.ParserError) -> dict[str, str]:
    return {"node": error.node_name(), "op": error.node_operator(), "reason": error.desc().strip()}


def describe(api: ModuleType, network: trt.INetworkDefinition) -> dict[str, Any]:
    """The convolutions of the network before TensorRT optimizes it.

    `convolutions`: their names, which are the ONNX nodes'; `precisions`: how many have weights of which type (the
    stored type where they are quantized); `masks`: the nodes that multiply weights at run time; `transposed`: the
    names of the quantized transposed ones.
    """
    convolutions: list[str] = []
    transposed: list[str] = []
    masks: list[str] = []
    precisions: Counter[str] = Counter()
    producers: dict[str, trt.ILayer] = {}
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        # The trip limit of a loop (an LSTM's) gives none.
        results: list[trt.ITensor] = [layer.get_output(i) for i in range(layer.num_outputs)]
        producers |= {result.name: layer for result in results}
        if layer.type not in (api.LayerType.CONVOLUTION, api.LayerType.DECONVOLUTION):
            continue
        convolutions.append(layer.name)
        kind = trt.dtype_name(results[0].dtype)
        weight: trt.ITensor | None = layer.get_input(1) if layer.num_inputs > 1 else None
        while weight is not None and weight.name in producers:
            step: trt.ILayer = producers[weight.name]
            source: trt.ITensor | None = step.get_input(0) if step.num_inputs else None
            if step.type == api.LayerType.ELEMENTWISE:
                masks.append(step.name)
            if step.type == api.LayerType.DEQUANTIZE and source is not None:
                kind = trt.dtype_name(source.dtype)
                transposed += [layer.name] * (layer.type == api.LayerType.DECONVOLUTION)
            weight = source
        precisions[_PRECISIONS.get(kind, kind)] += 1
    counts = dict(precisions.most_common())
    return {"convolutions": convolutions, "masks": masks, "precisions": counts, "transposed": transposed}


def configure(api: ModuleType, config: trt.IBuilderConfig, request: Mapping[str, Any]) -> None:
    """Set the build options. Precision is not among them: it is in the ONNX file's types."""
    # TF32 is on by default in TensorRT; here only when asked for.
    if request["tf32"]:
        config.set_flag(api.BuilderFlag.TF32)
    else:
        config.clear_flag(api.BuilderFlag.TF32)
    if request["version_compatible"]:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
    if request["strip"]:
        config.set_flag(api.BuilderFlag.STRIP_PLAN)
    if request["refit"]:
        config.set_flag(api.BuilderFlag.REFIT)
    if request["workspace"] is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, int(request["workspace"] * 2**20))
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    if request["hardware_compatibility"] == "ampere-plus":
        config.hardware_compatibility_level = api.HardwareCompatibilityLevel.AMPERE_PLUS
    elif request["hardware_compatibility"] == "same-compute-capability":
        config.hardware_compatibility_level = api.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    config.profiling_verbosity = {
        "detailed": api.ProfilingVerbosity.DETAILED,
        "layer-names": api.ProfilingVerbosity.LAYER_NAMES_ONLY,
        "none": api.ProfilingVerbosity.NONE,
    }[request["profiling_verbosity"]]
    if request["compute_capabilities"]:
        rtx_targets(api, config, request["compute_capabilities"])


def rtx_targets(api: ModuleType, config: trt.IBuilderConfig, capabilities: list[str]) -> None:
    """Build for these compute capabilities ("8.9", "current"): TensorRT-RTX alone has them."""
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in api.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    known["current"] = api.ComputeCapability.CURRENT
    unknown = [c for c in capabilities if c not in known]
    if unknown:
        raise BuildError(
            f"--compute-capability {','.join(unknown)}: TensorRT-RTX {trt.version(api)} builds for {', '.join(known)}; "
            f"leave the flag out for an engine that suits them all"
        )
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(known[capability], index):
            raise BuildError(f"TensorRT-RTX does not accept --compute-capability {capability}")


def add_profiles(
    builder: trt.Builder, config: trt.IBuilderConfig, inputs: list[trt.ITensor], request: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Give `config` the optimization profiles asked for, fitted to the network, or raise RefusedError."""
    described = [
        NetworkInput(t.name, tuple(t.shape), tuple(t.get_dimension_name(a) for a in range(len(t.shape))))
        for t in inputs
    ]
    resolved = resolve_profiles(from_json(request["profiles"]), described)
    for shapes in resolved:
        profile: trt.IOptimizationProfile = builder.create_optimization_profile()
        for name, (low, opt, high) in shapes.items():
            profile.set_shape(name, low, opt, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT does not accept the profile {shapes}")
    return [dict(shapes) for shapes in resolved]


def progress_monitor(api: ModuleType, emit: Emit) -> trt.IProgressMonitor:
    """A monitor that reports each phase's steps, at most ten messages a second."""
    last = [0.0]

    class Monitor(api.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.sizes: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.sizes[phase_name] = num_steps
            if parent_phase is None:
                emit({"phase": phase_name, "done": 0, "of": num_steps})

        def phase_finish(self, phase_name: str) -> None:
            self.sizes.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - last[0] > 0.1:
                last[0] = now
                emit({"phase": phase_name, "done": step + 1, "of": self.sizes.get(phase_name, 0)})
            return True

    monitor: trt.IProgressMonitor = Monitor()
    return monitor


def layer_list(
    api: ModuleType, log: trt.Log, serialized: trt.IHostMemory, *, version_compatible: bool = False
) -> dict[str, str]:
    """The engine's layers as text: the inspector's JSON where there is a driver, else the builder's list."""
    if driver_problem() is None:
        try:
            runtime, engine = trt.deserialize(
                api, log, memoryview(serialized), "the new engine", version_compatible=version_compatible
            )
        except UnavailableError:
            return {"log": log.layers}  # an engine for other GPUs than this one
        inspected = trt.inspect_engine(api, engine)
        del engine, runtime
        return {"log": log.layers, "inspector": inspected}
    return {"log": log.layers}


def _tensor(tensor: trt.ITensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": trt.dtype_name(tensor.dtype), "shape": list(tensor.shape)}


def _sink(log_file: write.LogFile | None, emit: Emit | None) -> Callable[[trt.LogRecord], None] | None:
    if log_file is None and emit is None:
        return None

    def write_record(record: trt.LogRecord) -> None:
        line = f"[{record.severity}] {record.message}\n"
        if log_file:
            log_file.write(line)
        if emit and record.severity != "VERBOSE":
            emit({"log": line})

    return write_record


if __name__ == "__main__":
    main()
