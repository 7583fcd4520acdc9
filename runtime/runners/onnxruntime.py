"""ONNX files through ONNX Runtime: CPU, CUDA, and the TensorRT execution providers where installed."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from gmconv.cli import require
from gmconv.errors import RefusedError, UnavailableError
from gmconv.files import sha256_file
from runtime import cuda
from runtime.artefact import open_artefact
from runtime.manifest import TensorSpec
from runtime.runners.base import Array, Query, Runner, Threads, parse_device, validate_feeds
from runtime.runners.onnxruntime_cuda import Binding, SessionLane
from runtime.runners.providers import PROVIDERS, Request, add_providers
from runtime.runners.qdq import Optimization, session_options
from runtime.runners.queries import Origin, Streams

_DTYPES = {"float": "float32", "double": "float64", "float8e4m3fn": "float8_e4m3fn", "float8e5m2": "float8_e5m2"}
_NO_KERNEL = re.compile(r"Could not find an implementation for (?P<op>\w+)\(\d+\) node")
_UNREGISTERED = re.compile(
    r"(?P<domain>[\w.\-]*):(?P<op>[\w.\-]+)\([^)]*\) is not a registered function/op"
    r"|No Op registered for (?P<plain>\w+)"
)
#: Shapes whose tensors stay on the GPU, those run last. A session never forgets a CUDA graph: it records no more.
BINDINGS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRuntimeOptions:
    """How to run an ONNX file.

    Args:
        provider: "cpu", "cuda", "tensorrt" or "rtx"; follows the device when None.
        threads, inter_threads: of the CPU kernels, within and between nodes; ONNX Runtime's choice when None.
        optimization: the most graph optimization; a quantized graph may get less (`runtime.runners.qdq`).
        quantized_as_written: keep Q/DQ pairs as they stand, whatever the manifest says of them.
        config: session config entries, e.g. `{"session.intra_op.allow_spinning": "0"}`.
        extra_outputs: names of intermediate tensors to return beside the network's own outputs.
        tf32: let CUDA use TF32 for fp32 convolutions and matmuls (off: strict fp32). The TensorRT providers take it for
            a whole process.
        cuda_graph: capture the run on the first call for each of the first `BINDINGS` shapes and replay it.
        profile: path prefix of ONNX Runtime's own profile, written on `close()`.
    """

    provider: str | None = None
    threads: Threads | None = None
    inter_threads: Threads | None = None
    optimization: Optimization = "all"
    quantized_as_written: bool = False
    config: Mapping[str, str] | None = None
    extra_outputs: Sequence[str] = ()
    tf32: bool = False
    cuda_graph: bool = False
    profile: str | None = None


class OnnxRuntimeRunner(Runner):
    """An ONNX file in an ONNX Runtime session.

    Args:
        path: the `.onnx` file; its manifest, if there is one, is verified before ONNX Runtime sees the bytes.
        device: "cpu", "cuda" or "cuda:N".
        options: see `OnnxRuntimeOptions`.

    Raises:
        RefusedError: not an ONNX file, an operator ONNX Runtime does not know (named), a graph it cannot run.
        UnavailableError: onnxruntime, the provider, a driver or a GPU is missing, or a node has to run on the CPU.
            There is no fallback, unless `config` has `session.disable_cpu_ep_fallback` "0".
    """

    Options = OnnxRuntimeOptions

    def __init__(self, path: Path, device: str = "cpu", options: OnnxRuntimeOptions = OnnxRuntimeOptions()) -> None:
        path = Path(path)
        self.artefact = replace(open_artefact(path), kind="onnx")
        ort = _import()
        kind, index = parse_device(device)
        self.device = kind if kind == "cpu" else f"cuda:{index}"
        self._provider = options.provider or kind
        _require_fit(self._provider, kind, device, options.cuda_graph)
        entries = dict(options.config or {})
        if kind != "cpu":
            entries.setdefault("session.disable_cpu_ep_fallback", "1")
        graph = session_options(self.artefact.manifest, "serve").limited(options.optimization)
        as_written = graph.as_written or options.quantized_as_written
        graph = replace(graph, as_written=as_written, config={**graph.config, **entries})
        threads, cuda_graph = options.threads, options.cuda_graph

        def make_options() -> Any:
            found = ort.SessionOptions()
            found.log_severity_level = 4
            graph.apply(found, ort)
            found.intra_op_num_threads = threads or 0
            found.inter_op_num_threads = options.inter_threads or 0
            if options.inter_threads and options.inter_threads > 1:
                found.execution_mode = ort.ExecutionMode.ORT_PARALLEL
            if options.profile:
                found.enable_profiling, found.profile_file_prefix = True, options.profile
            return found

        self._options = make_options
        self._graph, self._extra = cuda_graph, tuple(options.extra_outputs)
        self._request = Request(provider=self._provider, index=index, tf32=options.tf32, cuda_graph=cuda_graph)
        if kind != "cpu" and path.is_file():
            digest = self.artefact.sha256 or sha256_file(path)
            self._request = replace(self._request, model=f"{digest[:16]}-{ort.__version__}")
        self._session = _session(ort, path, make_options(), self._request, self._extra)
        self._ort = ort
        self._ranges = self.artefact.manifest.ranges if self.artefact.manifest else {}
        self.inputs = tuple(_spec(arg) for arg in self._session.get_inputs())
        self.outputs = tuple(_spec(arg) for arg in self._session.get_outputs())
        self._names = [spec.name for spec in self.outputs]
        self._bindings: OrderedDict[tuple[Any, ...], Binding] = OrderedDict()
        self._recorded = 0
        self._lanes: list[SessionLane] = []
        self._things: list[cuda.Stream | cuda.Event] = []
        self._gpu: cuda.Device | None = None
        count = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
        self.name = f"onnxruntime {self._provider}{count}" + (", CUDA graph" if cuda_graph else "")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once on arrays in host memory; raises RefusedError when a feed does not fit."""
        validate_feeds(self.inputs, feeds, ranges=self._ranges)
        try:
            if self._provider == "cpu":
                values = self._session.run(self._names, dict(feeds))
            else:
                values = self._binding(feeds).run(feeds)
        except Exception as error:
            if not _from_ort(error):
                raise
            raise self._failure(error) from error
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
        self._bindings.clear()
        if self._gpu is not None:
            with contextlib.suppress(cuda.CudaError), self._gpu.current():
                for thing in (*self._lanes, *self._things):
                    thing.close()
            self._lanes, self._things, self._gpu = [], [], None
        self._session = None

    def _failure(self, error: Exception) -> click.ClickException:
        """ONNX Runtime's refusal of a run in this project's words."""
        reason = _reason(error)
        if self._provider != "cpu" and re.search(
            r"[Oo]ut of memory|Failed to allocate memory|CUDA failure 2\b", reason
        ):
            return cuda.DeviceMemoryError(f"{self.device}: {self.name} has no room for this batch; use a smaller one")
        if self._provider != "cpu" and re.search(r"CUDA failure|CUDNN failure|CUBLAS failure", reason):
            return cuda.CudaError(f"{self.device}: {self.name} failed: {reason}")
        return RefusedError(f"{self.name} cannot run this network on these inputs: {reason}")

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
        """On a GPU, queries clocked by CUDA events as an engine's are, each stream with a session of its own."""
        if self._provider == "cpu":
            return None
        results = self.run(feeds)  # what cannot run fails here, in words; the shapes of the outputs
        index = self._request.index
        self._gpu = self._gpu or cuda.open_device(index)

        def open_session(stream: int) -> Any:
            request = replace(self._request, cuda_graph=cuda_graph, stream=stream)
            return _session(self._ort, self.artefact.path, self._options(), request, self._extra)

        rounds: list[list[Query]] = [[] for _ in range(count)]
        origin: Origin | None = None
        with self._gpu.current():
            for _ in range(streams):
                specs = (self.inputs, self.outputs)
                lane = SessionLane(self._ort, self._gpu, open_session, specs, cuda_graph=cuda_graph)
                self._lanes.append(lane)
                lane.load(feeds, results)
                if origin is None:
                    event = self._gpu.event()
                    self._things.append(event)
                    origin = Origin(event, lane.stream)
                up, down = self._gpu.stream(), self._gpu.stream()
                self._things += [up, down]
                for turn in rounds:
                    order = Streams(up, lane.stream, down)
                    turn.append(lane.query(origin, order, transfers=transfers, spin=spin))
        return [query for turn in rounds for query in turn]

    def _binding(self, feeds: Mapping[str, Array]) -> Binding:
        key = tuple((name, array.shape) for name, array in sorted(feeds.items()))
        binding = self._bindings.pop(key, None)
        if binding is None:
            graph = -1
            if self._graph and self._recorded < BINDINGS:
                self._recorded += 1
                graph = self._recorded
            binding = Binding(self._ort, self._session, feeds, self.outputs, self._request.index, graph)
        self._bindings[key] = binding  # the newest use last
        if len(self._bindings) > BINDINGS:
            self._bindings.popitem(last=False)
        return binding


def open_bytes(model: bytes, path: Path, outputs: Sequence[str]) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """A model held in memory as a function from its inputs to `outputs`, on the CPU exactly as written (no rewrites).

    `path` is the file it was derived from: external data is looked for beside it, and messages name it.
    """
    ort = _import()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session_options(None, "layers").apply(options, ort)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))

    def said(error: Exception) -> Exception:
        return RefusedError(f"{path}: cannot be run in parts ({_reason(error)})") if _from_ort(error) else error

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return dict(zip(outputs, session.run(list(outputs), dict(feeds)), strict=True))
        except Exception as error:
            raise said(error) from error

    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise said(error) from error
    return run


def _import() -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    ort = require("onnxruntime", "cpu")
    ort.set_default_logger_severity(4)
    return ort


def _require_fit(provider: str, kind: str, device: str, cuda_graph: bool) -> None:
    """Raise UnavailableError where the provider, the device and the graph do not go together."""
    if provider not in PROVIDERS:
        raise UnavailableError(f"ONNX Runtime provider {provider!r} is unknown; one of {', '.join(PROVIDERS)}")
    if (provider == "cpu") != (kind == "cpu"):
        raise UnavailableError(f"provider {provider!r} does not run on device {device!r}")
    if cuda_graph and kind == "cpu":
        raise UnavailableError("a CUDA graph needs a GPU; leave cuda_graph out on the CPU")


def _session(ort: Any, path: Path, options: Any, request: Request, extra_outputs: tuple[str, ...]) -> Any:
    provider = request.provider
    model: str | bytes = str(path)
    if not path.is_file():
        raise RefusedError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}; name an ONNX file")
    if path.stat().st_size == 0:
        raise RefusedError(f"{path}: is empty; export it again")
    if extra_outputs:
        model = _with_outputs(path, extra_outputs)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    providers = add_providers(ort, options, request)
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
        if lacking := _NO_KERNEL.search(str(error)):
            raise RefusedError(
                f"{path}: ONNX Runtime has no {lacking['op']} of the type that it has there, as of many in float64: "
                f"export the network in float32 (model.float())"
            ) from error
        if "fallback to CPU EP has been explicitly disabled" in str(error):
            raise UnavailableError(
                f"{path}: {PROVIDERS[provider]} does not run every node, or does not load on this machine (see "
                f"`nvidia-smi`); use --device cpu"
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
