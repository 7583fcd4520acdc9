"""A Triton `ModelConfig` for an artefact, and the check that one fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.cli import require
from runtime.errors import RefusedError
from runtime.manifest import Manifest, ShapeRange, TensorSpec

DEFAULT_MAX_BATCH = 32
BACKEND_FILE = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How Triton serves a model. Times in µs; 0 in `max_queue` and `queue_timeout` means no limit.

    `max_batch` None takes the engine's profile maximum (32 for an ONNX file). `warmup_shapes` gives one sample's shape,
    without the batch, for inputs with dynamic axes that no profile and no preprocessing pins down.
    """

    max_batch: int | None = None
    instances: int = 1
    kind: Literal["auto", "gpu", "cpu"] = "auto"
    gpus: tuple[int, ...] = ()
    delay: int = 0
    max_queue: int = 0
    queue_timeout: int = 0
    version_policy: str = "latest:1"
    warmup: bool = True
    warmup_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    cuda_graphs: bool = False
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """What Triton must know of an artefact: backend, tensors with the batch axis, profiles, labels.

    `batched` is True where axis 0 of every input and output is dynamic: the axis Triton batches along.
    """

    source: Path
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[dict[str, ShapeRange], ...] = ()
    labels: tuple[str, ...] | None = None
    sample: tuple[int, ...] | None = None
    external: tuple[str, ...] = ()

    @property
    def batched(self) -> bool:
        """Whether Triton can put several requests into one batch."""
        return all(s.shape and isinstance(s.shape[0], str) for s in (*self.inputs, *self.outputs))

    @property
    def batch_range(self) -> tuple[int, int | None]:
        """Smallest and largest batch the engine's profiles take; (1, None) without profiles."""
        ranges = [r for profile in self.profiles for r in profile.values()]
        if not ranges or not self.batched:
            return 1, None
        largest = max(min(r.max[0] for r in profile.values()) for profile in self.profiles if profile)
        return min(r.min[0] for r in ranges), largest


def interface_of(artefact: Path, manifest: Manifest | None) -> Interface:
    """The `Interface` of an artefact, from its manifest or, for a foreign ONNX file, from its graph.

    Raises RefusedError for an unreadable or unknown file, an engine without a manifest, and a TensorRT-RTX engine.
    """
    if not artefact.is_file():
        raise RefusedError(f"{artefact}: no such file")
    suffix = artefact.suffix.lower()
    kind = manifest.artefact.kind if manifest else {".onnx": "onnx", ".plan": "engine", ".engine": "engine"}.get(suffix)
    if kind not in ("onnx", "engine"):
        raise RefusedError(f"{artefact}: not an ONNX file or an engine; export it with export.onnx or export.tensorrt")
    if manifest is None:
        if kind == "engine":
            raise RefusedError(
                f"{artefact}: an engine without its manifest {artefact.name}.json; its inputs cannot be read without "
                f"the GPU it was built for. Build it with export.tensorrt, or copy both files"
            )
        return _graph_interface(artefact)
    if kind == "engine" and is_rtx(manifest):
        raise RefusedError(
            f"{artefact}: a TensorRT-RTX engine; Triton's tensorrt backend loads engines of the full TensorRT only. "
            f"Build with export.tensorrt --flavor tensorrt, give Triton the ONNX file, or serve this with runtime.serve"
        )
    return Interface(
        source=artefact,
        backend="tensorrt" if kind == "engine" else "onnxruntime",
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        profiles=manifest.profiles,
        labels=manifest.labels,
        sample=_sample(manifest),
        external=tuple(e.file for e in manifest.external),
    )


def is_rtx(manifest: Manifest) -> bool:
    """Whether an engine's manifest says that TensorRT-RTX built it."""
    flavor = str(manifest.build.get("flavor", "")).lower()
    return flavor == "rtx" or (not flavor and any("rtx" in name.lower() for name in manifest.versions))


def model_config(name: str, interface: Interface, options: ServingOptions) -> Any:
    """The `inference.ModelConfig` that serves `interface` as `name`.

    Raises RefusedError when an option does not fit the artefact (batch over the profile, a dtype Triton lacks, a
    warm-up shape that is not known).
    """
    pb = require("tritonclient.grpc.model_config_pb2", "serve")
    limit = _batch_limit(interface, options)
    config = pb.ModelConfig(name=name, backend=interface.backend, max_batch_size=limit)
    config.default_model_filename = BACKEND_FILE[interface.backend]
    for spec in interface.inputs:
        _tensor(pb, config.input.add(), spec, interface, batched=limit > 0)
    for spec in interface.outputs:
        tensor = config.output.add()
        _tensor(pb, tensor, spec, interface, batched=limit > 0)
        if interface.labels and spec.shape and spec.shape[-1] == len(interface.labels):
            tensor.label_filename = "labels.txt"
    _version_policy(config, options.version_policy)
    _instance_group(pb, config, interface, options)
    if limit > 0:
        _dynamic_batching(pb, config, options)
    if options.warmup:
        _warmup(config, interface, options, limit)
    if options.cuda_graphs:
        _cuda_graphs(config, interface, limit)
    if options.threads is not None:
        if interface.backend != "onnxruntime":
            raise RefusedError(f"{interface.source}: --threads is for the onnxruntime backend, this is an engine")
        config.parameters["intra_op_thread_count"].string_value = str(options.threads)
    return config


def check_config(config: Any, interface: Interface) -> None:
    """Raise RefusedError unless `config` and the artefact agree on names, order, dtypes, dims and batch limit."""
    pb = require("tritonclient.grpc.model_config_pb2", "serve")
    where = f"{interface.source}: config.pbtxt"
    if config.backend != interface.backend:
        raise RefusedError(f"{where} names backend {config.backend!r}; this artefact needs {interface.backend!r}")
    low, high = interface.batch_range
    limit = config.max_batch_size
    if limit and not interface.batched:
        raise RefusedError(f"{where} says max_batch_size {limit}, but the artefact's batch is fixed")
    if high is not None and limit > high:
        raise RefusedError(f"{where} says max_batch_size {limit}, but the engine's profile ends at {high}")
    if limit and low > 1:
        raise RefusedError(f"{where} batches from 1, but the engine's profile starts at {low}")
    for side, found, wanted in (
        ("input", config.input, interface.inputs),
        ("output", config.output, interface.outputs),
    ):
        if [t.name for t in found] != [s.name for s in wanted]:
            raise RefusedError(f"{where} lists {side}s {[t.name for t in found]}, not {[s.name for s in wanted]}")
        for tensor, spec in zip(found, wanted, strict=True):
            dtype = pb.DataType.Name(tensor.data_type)
            dims = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else tuple(tensor.dims)
            expected = _dims(spec, batched=limit > 0)
            if dtype != _TYPES.get(spec.dtype) or dims != expected:
                raise RefusedError(
                    f"{where} gives {side} {spec.name!r} as {dtype} {list(dims)}, the artefact as {spec.dtype} "
                    f"{list(expected)}"
                )


def to_text(config: Any) -> str:
    """config.pbtxt: the message in protobuf's text format, UTF-8 left readable."""
    from google.protobuf import text_format

    return text_format.MessageToString(config, as_utf8=True)


def from_text(text: str, source: Path) -> Any:
    """Parse a config.pbtxt. Raises RefusedError when it is not one."""
    from google.protobuf import text_format

    pb = require("tritonclient.grpc.model_config_pb2", "serve")
    try:
        return text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise RefusedError(f"{source}: not a Triton configuration ({error}); repair or remove it") from error


def _batch_limit(interface: Interface, options: ServingOptions) -> int:
    low, high = interface.batch_range
    if not interface.batched:
        if options.max_batch:
            raise RefusedError(
                f"{interface.source}: its batch is fixed, so Triton cannot batch it; leave --max-batch out, or "
                f"export with a dynamic batch"
            )
        return 0
    limit = options.max_batch if options.max_batch is not None else (high or DEFAULT_MAX_BATCH)
    if high is not None and limit > high:
        raise RefusedError(
            f"{interface.source}: --max-batch {limit} is over the engine's profile maximum {high}; "
            f"lower it, or build with --max {limit}"
        )
    if limit and low > 1:
        raise RefusedError(
            f"{interface.source}: the engine's profile starts at batch {low}, Triton sends batches from 1; "
            f"build with --min 1, or give --max-batch 0"
        )
    return limit


def _dims(spec: TensorSpec, *, batched: bool) -> tuple[int, ...]:
    shape = spec.shape[1:] if batched else spec.shape
    return tuple(d if isinstance(d, int) else -1 for d in shape)


def _tensor(pb: Any, tensor: Any, spec: TensorSpec, interface: Interface, *, batched: bool) -> None:
    if spec.dtype not in _TYPES:
        raise RefusedError(f"{interface.source}: {spec.name!r} is {spec.dtype}, a type Triton does not carry")
    tensor.name = spec.name
    tensor.data_type = pb.DataType.Value(_TYPES[spec.dtype])
    dims = _dims(spec, batched=batched)
    tensor.dims.extend(dims or (1,))
    if not dims:  # Triton wants at least one dim; the reshape to [] is how its documentation writes a scalar
        tensor.reshape.SetInParent()


def _version_policy(config: Any, policy: str) -> None:
    kind, _, value = policy.partition(":")
    if kind == "all":
        config.version_policy.all.SetInParent()
    elif kind == "latest":
        config.version_policy.latest.num_versions = int(value)
    else:
        config.version_policy.specific.versions.extend(sorted({int(v) for v in value.split(",")}))


def _instance_group(pb: Any, config: Any, interface: Interface, options: ServingOptions) -> None:
    kind = "gpu" if options.kind == "auto" and (interface.backend == "tensorrt" or options.gpus) else options.kind
    if kind == "cpu" and (interface.backend == "tensorrt" or options.gpus):
        what = "a TensorRT engine runs on a GPU" if interface.backend == "tensorrt" else "--gpus names GPUs"
        raise RefusedError(f"{interface.source}: {what}; leave --kind cpu out")
    group = config.instance_group.add()
    group.kind = pb.ModelInstanceGroup.Kind.Value(f"KIND_{kind.upper()}")
    group.count = options.instances
    group.gpus.extend(options.gpus)
    if interface.backend == "tensorrt" and len(interface.profiles) > 1:
        group.profile.extend(str(i) for i in range(len(interface.profiles)))


def _dynamic_batching(pb: Any, config: Any, options: ServingOptions) -> None:
    batching = config.dynamic_batching
    batching.SetInParent()
    batching.max_queue_delay_microseconds = options.delay
    if options.max_queue or options.queue_timeout:
        batching.default_queue_policy.max_queue_size = options.max_queue
        batching.default_queue_policy.default_timeout_microseconds = options.queue_timeout
        batching.default_queue_policy.timeout_action = pb.ModelQueuePolicy.TimeoutAction.Value("REJECT")


def _warmup(config: Any, interface: Interface, options: ServingOptions, limit: int) -> None:
    unknown = set(options.warmup_shapes) - {s.name for s in interface.inputs}
    if unknown:
        raise RefusedError(f"{interface.source}: has no input {sorted(unknown)[0]!r} to give a --shape for")
    for batch in sorted({1, limit}) if limit else [0]:
        warmup = config.model_warmup.add()
        warmup.name = f"batch {batch}" if batch else "fixed batch"
        warmup.batch_size = batch
        for tensor, spec in zip(config.input, interface.inputs, strict=True):
            data = warmup.inputs[spec.name]
            data.data_type = tensor.data_type
            data.dims.extend(_warmup_dims(spec, interface, options, batched=limit > 0) or (1,))
            if spec.dtype.startswith(("float", "bfloat")):
                data.random_data = True
            else:  # random indices could leave an embedding's range
                data.zero_data = True


def _warmup_dims(spec: TensorSpec, interface: Interface, options: ServingOptions, *, batched: bool) -> tuple[int, ...]:
    dims = _dims(spec, batched=batched)
    candidates: list[tuple[int, ...]] = []
    given = options.warmup_shapes.get(spec.name)
    if given is not None:
        candidates = [given]
    elif -1 not in dims:
        return dims
    else:
        candidates += [p[spec.name].opt[1 if batched else 0 :] for p in interface.profiles if spec.name in p]
        if interface.sample is not None:
            candidates.append(interface.sample if batched else (1, *interface.sample))
    for candidate in candidates:
        if len(candidate) == len(dims) and all(d in (-1, c) for d, c in zip(dims, candidate, strict=True)):
            return candidate
    if given is not None:
        raise RefusedError(f"{interface.source}: --shape {list(given)} does not fit input {spec.name!r}: {list(dims)}")
    raise RefusedError(
        f"{interface.source}: input {spec.name!r} has dynamic axes {list(dims)}; give a warm-up shape, such as "
        f"--shape {spec.name}=3x224x224, or --no-warmup"
    )


def _cuda_graphs(config: Any, interface: Interface, limit: int) -> None:
    if interface.backend != "tensorrt":
        raise RefusedError(f"{interface.source}: --cuda-graphs is for engines; this is an ONNX file")
    cuda = config.optimization.cuda
    cuda.graphs = True
    dynamic = [s.name for s in interface.inputs if -1 in _dims(s, batched=limit > 0)]
    if dynamic:
        raise RefusedError(f"{interface.source}: --cuda-graphs needs fixed axes, {dynamic[0]!r} has dynamic ones")
    for batch in sorted({1, limit}) if limit else [0]:
        spec = cuda.graph_spec.add()
        spec.batch_size = batch
        for tensor in interface.inputs:
            spec.input[tensor.name].dim.extend(_dims(tensor, batched=limit > 0))


def _sample(manifest: Manifest) -> tuple[int, ...] | None:
    preprocessing = manifest.preprocessing
    if preprocessing is None or len(manifest.inputs) != 1:
        return None
    return (1 if preprocessing.channel_order == "L" else 3, *preprocessing.size)


def _graph_interface(artefact: Path) -> Interface:
    onnx = require("onnx", "export")
    try:
        model = onnx.load(artefact, load_external_data=False)
        onnx.checker.check_model(model) if not _external(onnx, model, artefact) else None
        model = onnx.shape_inference.infer_shapes(model)
    except RefusedError:
        raise
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RefusedError(f"{artefact}: not a readable ONNX file ({line[:200]})") from error
    initializers = {i.name for i in model.graph.initializer}
    inputs = tuple(_spec(onnx, v, artefact) for v in model.graph.input if v.name not in initializers)
    outputs = tuple(_spec(onnx, v, artefact) for v in model.graph.output)
    if not inputs or not outputs:
        raise RefusedError(f"{artefact}: the graph has no {'outputs' if inputs else 'inputs'}; nothing to serve")
    return Interface(
        source=artefact,
        backend="onnxruntime",
        inputs=inputs,
        outputs=outputs,
        external=_external(onnx, model, artefact),
    )


def _external(onnx: Any, model: Any, artefact: Path) -> tuple[str, ...]:
    """Base names of the external data files the graph reads, each checked to lie beside it."""
    from onnx.external_data_helper import _get_all_tensors

    files: set[str] = set()
    for tensor in _get_all_tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if not location or "/" in location or "\\" in location or location in (".", ".."):
            raise RefusedError(f"{artefact}: external data {location[:80]!r} lies outside its folder; save it beside")
        if not artefact.with_name(location).is_file():
            raise RefusedError(f"{artefact}: its external data {location} is missing; copy it beside the model")
        files.add(location)
    return tuple(sorted(files))


def _spec(onnx: Any, value: Any, artefact: Path) -> TensorSpec:
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
        raise RefusedError(f"{artefact}: {value.name!r} has no known shape; run ONNX shape inference, or export again")
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except (KeyError, TypeError) as error:
        raise RefusedError(f"{artefact}: {value.name!r} has ONNX type {tensor.elem_type}, unknown here") from error
    if dtype == "object":
        raise RefusedError(f"{artefact}: {value.name!r} carries strings; this writes numeric models only")
    shape = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or f"{value.name}_{i}")
        for i, d in enumerate(tensor.shape.dim)
    )
    return TensorSpec(value.name, dtype, shape)
