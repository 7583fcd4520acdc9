"""ONNX files through ONNX Runtime: CPU, CUDA, and the TensorRT execution providers where installed."""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gmconv.cli import require
from gmconv.errors import RefusedError, UnavailableError
from runtime.manifest import Manifest, TensorSpec, find_manifest
from runtime.runners.base import Array, Runner, numpy_dtype, validate_feeds
from runtime.runners.qdq import serving_options

Optimization = Literal["disable", "basic", "extended", "all"]

#: What a session is asked for by name, and ONNX Runtime's name for it.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_DTYPES = {"float": "float32", "double": "float64", "float8e4m3fn": "float8_e4m3fn", "float8e5m2": "float8_e5m2"}
_UNREGISTERED = re.compile(
    r"(?P<domain>[\w.\-]*):(?P<op>[\w.\-]+)\([^)]*\) is not a registered function/op"
    r"|No Op registered for (?P<plain>\w+)"
)
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


class OnnxRuntimeRunner(Runner):
    """An ONNX file in an ONNX Runtime session.

    Args:
        path: the `.onnx` file; its manifest, if there is one, is verified before ONNX Runtime sees the bytes.
        device: "cpu", "cuda" or "cuda:N".
        provider: "cpu", "cuda", "tensorrt" or "rtx"; follows the device when None.
        threads, inter_threads: of the CPU kernels, within and between nodes; ONNX Runtime's choice when None.
        optimization: graph optimization level.
        quantized_as_written: keep Q/DQ pairs as they stand (`session.disable_quant_qdq`): the reference result of a
            quantized graph, which ONNX Runtime's own rewrites change.
        config: session config entries, e.g. `{"session.intra_op.allow_spinning": "0"}`.
        extra_outputs: names of intermediate tensors to return beside the network's own outputs.
        tf32: let CUDA use TF32 for fp32 convolutions and matmuls (off: strict fp32).
        cuda_graph: capture the run on the first call for each shape and replay it.
        profile: path prefix of ONNX Runtime's own profile, written on `close()`.

    Raises:
        RefusedError: not an ONNX file, an operator ONNX Runtime does not know (named), a graph it cannot run.
        UnavailableError: onnxruntime, the provider, a driver or a GPU is missing; there is no fallback.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        provider: str | None = None,
        threads: int | None = None,
        inter_threads: int | None = None,
        optimization: Optimization = "all",
        quantized_as_written: bool = False,
        config: Mapping[str, str] | None = None,
        extra_outputs: Sequence[str] = (),
        tf32: bool = False,
        cuda_graph: bool = False,
        profile: str | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        path = Path(path)
        self.path = path
        self.manifest = manifest or find_manifest(path)
        ort = _import()
        kind, index, self.device = _device(device)
        self._provider = provider or kind
        if self._provider not in PROVIDERS:
            raise UnavailableError(
                f"ONNX Runtime provider {self._provider!r} is unknown; one of {', '.join(PROVIDERS)}"
            )
        if (self._provider == "cpu") != (kind == "cpu"):
            raise UnavailableError(f"provider {self._provider!r} does not run on device {device!r}")
        if cuda_graph and kind == "cpu":
            raise UnavailableError("a CUDA graph needs a GPU; leave cuda_graph out on the CPU")
        if kind == "cpu":  # some Q/DQ graphs are refused, or silently wrong, with more optimization than this
            most = serving_options(self.manifest).get("optimization", optimization)
            optimization = min(optimization, most, key=list(_LEVELS).index)
        if quantized_as_written:  # beyond "basic" come Q/DQ rewrites that the session entry does not turn off
            optimization = min(optimization, "basic", key=list(_LEVELS).index)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[optimization])
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = inter_threads or 0
        if inter_threads and inter_threads > 1:
            options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        entries = dict(config or {}) | ({"session.disable_quant_qdq": "1"} if quantized_as_written else {})
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        self._graph = cuda_graph
        self._session = _session(ort, path, options, self._provider, index, tuple(extra_outputs), tf32, cuda_graph)
        self._ort = ort
        self.inputs = tuple(_spec(arg) for arg in self._session.get_inputs())
        self.outputs = tuple(_spec(arg) for arg in self._session.get_outputs())
        self._names = [spec.name for spec in self.outputs]
        self._bindings: dict[tuple[Any, ...], _Binding] = {}
        count = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
        self.name = f"onnxruntime {self._provider}{count}" + (", CUDA graph" if cuda_graph else "")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once on arrays in host memory; raises RefusedError when a feed does not fit."""
        validate_feeds(self.inputs, feeds)
        try:
            if self._provider == "cpu":
                values = self._session.run(self._names, dict(feeds))
            else:
                values = self._binding(feeds).run(feeds)
        except Exception as error:
            if not _from_ort(error):
                raise
            raise RefusedError(f"{self.name} cannot run this network on these inputs: {_reason(error)}") from error
        return dict(zip(self._names, values, strict=True))

    def bind(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """A call that runs with `feeds`: on the CPU `session.run` itself, on a GPU with tensors kept there."""
        self.run(feeds)  # what cannot run fails here, in words, and not inside a timing loop
        if self._provider == "cpu":
            return functools.partial(self._session.run, self._names, dict(feeds))
        binding = self._binding(feeds)
        binding.load(feeds)
        return binding.execute

    def end_profiling(self) -> str:
        """Stop ONNX Runtime's profiler; the file it wrote."""
        return str(self._session.end_profiling())

    def close(self) -> None:
        """Free the session and what is bound to it."""
        self._bindings = {}
        self._session = None

    def _binding(self, feeds: Mapping[str, Array]) -> _Binding:
        key = tuple((name, array.shape) for name, array in sorted(feeds.items()))
        if key not in self._bindings:
            index = int(self.device.partition(":")[2] or 0)
            graph = len(self._bindings) + 1 if self._graph else -1
            self._bindings[key] = _Binding(self._ort, self._session, feeds, self.outputs, index, graph)
        return self._bindings[key]


def run_bytes(model: bytes, path: Path, outputs: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a model held in memory once on the CPU, exactly as written (no graph rewrites).

    `path` is the file it was derived from: external data is looked for beside it, and messages name it.
    """
    ort = _import()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        values = session.run(list(outputs), dict(feeds))
    except Exception as error:
        if not _from_ort(error):
            raise
        raise RefusedError(f"{path}: cannot be run layer by layer ({_reason(error)})") from error
    return dict(zip(outputs, values, strict=True))


class _Binding:
    """Inputs and outputs of one shape in device memory, at addresses that stay (a CUDA graph needs that)."""

    def __init__(
        self,
        ort: Any,
        session: Any,
        feeds: Mapping[str, Array],
        outputs: tuple[TensorSpec, ...],
        index: int,
        graph: int,
    ) -> None:
        self._session, self._binding, self._options = session, session.io_binding(), ort.RunOptions()
        self._options.log_severity_level = 4
        if graph >= 0:
            self._options.add_run_config_entry("gpu_graph_id", str(graph))
        self._inputs = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", index)
            for name, array in feeds.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for spec in outputs:
            self._binding.bind_output(spec.name, "cuda", index)
        if graph >= 0:
            # A captured graph writes to fixed addresses: run once to learn the shapes, then own the buffers.
            uncaptured = ort.RunOptions()
            uncaptured.add_run_config_entry("gpu_graph_id", "-1")
            session.run_with_iobinding(self._binding, uncaptured)
            shapes = [value.shape() for value in self._binding.get_outputs()]
            self._owned = []
            for spec, shape in zip(outputs, shapes, strict=True):
                owned = ort.OrtValue.ortvalue_from_shape_and_type(shape, numpy_dtype(spec.dtype), "cuda", index)
                self._owned.append(owned)
                self._binding.bind_ortvalue_output(spec.name, owned)

    def load(self, feeds: Mapping[str, Array]) -> None:
        for name, array in feeds.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(array))

    def execute(self) -> None:
        """Run and wait: `run_with_iobinding` synchronizes its stream before it returns."""
        self._session.run_with_iobinding(self._binding, self._options)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        self.load(feeds)
        self.execute()
        return list(self._binding.copy_outputs_to_cpu())


def _import() -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    ort = require("onnxruntime", "cpu")
    ort.set_default_logger_severity(4)
    return ort


def _device(device: str) -> tuple[str, int, str]:
    kind, _, index = device.partition(":")
    if kind == "gpu":
        kind = "cuda"
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise UnavailableError(f"device {device!r} is unknown; cpu, cuda or cuda:N")
    return kind, int(index or 0), kind if kind == "cpu" else f"cuda:{index or 0}"


def _session(
    ort: Any,
    path: Path,
    options: Any,
    provider: str,
    index: int,
    extra_outputs: tuple[str, ...],
    tf32: bool,
    cuda_graph: bool,
) -> Any:
    model: str | bytes = str(path)
    if not path.is_file():
        raise RefusedError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}; name an ONNX file")
    if path.stat().st_size == 0:
        raise RefusedError(f"{path}: is empty; export it again")
    if extra_outputs:
        model = _with_outputs(path, extra_outputs)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    providers = _providers(ort, options, provider, index, tf32, cuda_graph)
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base class below Exception
        if not _from_ort(error):
            raise
        if unknown := _UNREGISTERED.search(str(error)):
            op, domain = unknown["op"] or unknown["plain"], unknown["domain"] or "ai.onnx"
            raise RefusedError(
                f"{path}: uses the operator {op} of domain {domain!r}, which ONNX Runtime does not have; "
                f"export the network with standard ONNX operators"
            ) from error
        if provider != "cpu" and re.search(r"CUDA|cuda|TensorRT|cudnn|driver", str(error)):
            raise UnavailableError(f"ONNX Runtime cannot use {PROVIDERS[provider]}: {_reason(error)}") from error
        raise RefusedError(f"{path}: ONNX Runtime cannot load it ({_reason(error)}); export it again") from error
    first = session.get_providers()[0]
    if first != PROVIDERS[provider]:
        raise UnavailableError(
            f"ONNX Runtime was asked for {PROVIDERS[provider]} and fell back to {first}: the driver, CUDA or "
            f"cuDNN does not load on this machine; see `nvidia-smi`, or use --device cpu"
        )
    return session


def _providers(
    ort: Any, options: Any, provider: str, index: int, tf32: bool, cuda_graph: bool
) -> list[tuple[str, dict[str, str]]]:
    """What to ask for; raises UnavailableError when this ONNX Runtime does not have it."""
    if provider == "cpu":
        return [(PROVIDERS["cpu"], {})]
    name = PROVIDERS[provider]
    if provider == "rtx" and name not in ort.get_available_providers():
        return _rtx_plugin(ort, options, index)
    if name not in ort.get_available_providers():
        raise UnavailableError(
            f"this onnxruntime has no {name}: pip install 'gmconv-deploy[gpu]' on a machine with an NVIDIA driver, or "
            f"use --device cpu"
        )
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    chosen = {"device_id": str(index)}
    if provider == "cuda":
        chosen |= {"use_tf32": str(int(tf32)), "enable_cuda_graph": str(int(cuda_graph))}
    elif provider == "tensorrt":
        chosen |= {"trt_cuda_graph_enable": str(cuda_graph)}
    elif cuda_graph:
        chosen |= {"enable_cuda_graph": "1"}
    return [(name, chosen)]


def _rtx_plugin(ort: Any, options: Any, index: int) -> list[tuple[str, dict[str, str]]]:
    """Register the plug-in provider from its own wheel; the session then takes it from `options`."""
    try:
        plugin = importlib.import_module(_PLUGIN)
    except ImportError as error:
        raise UnavailableError(
            "the TensorRT-RTX execution provider is not installed: pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"
        ) from error
    name = PROVIDERS["rtx"]
    try:
        ort.register_execution_provider_library(name, str(plugin.get_library_path()))
    except Exception as error:
        if "already" not in str(error):
            raise UnavailableError(f"the TensorRT-RTX execution provider does not load: {_reason(error)}") from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if index >= len(devices):
        raise UnavailableError(f"the TensorRT-RTX execution provider finds {len(devices)} GPUs; cuda:{index} was asked")
    options.add_provider_for_devices([devices[index]], {})
    return []


def _with_outputs(path: Path, names: tuple[str, ...]) -> bytes:
    """The model's bytes with `names` added to the graph's outputs; external data stays where it is."""
    onnx = require("onnx", "export")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise RefusedError(f"{path}: is not a readable ONNX file ({_reason(error)}); export it again") from error
    made = {name for node in model.graph.node for name in node.output}
    if unknown := [name for name in names if name not in made]:
        raise RefusedError(f"{path}: has no tensor named {unknown[0]!r}")
    present = {output.name for output in model.graph.output}
    for name in names:
        if name not in present:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return bytes(model.SerializeToString())


def _spec(arg: Any) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", arg.type)
    if match is None:
        raise RefusedError(f"{arg.name!r} is a {arg.type}; only networks of plain tensors run here")
    dims = enumerate(arg.shape or ())
    shape = tuple(d if isinstance(d, int) else (d or f"{arg.name}_{axis}") for axis, d in dims)
    return TensorSpec(arg.name, _DTYPES.get(match[1], match[1]), shape)


def _from_ort(error: Exception) -> bool:
    return type(error).__module__.startswith("onnxruntime") or isinstance(error, RuntimeError | ValueError)


def _reason(error: Exception) -> str:
    """ONNX Runtime's message without its prefix, source locations and paths, on one line."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : (Load model from .*? failed: ?)?", "", str(error))
    text = re.sub(r"/\S+\.(cc|h|cpp|hpp):\d+ \S*", "", text)
    return " ".join(text.split())[:300].rstrip(". ")
