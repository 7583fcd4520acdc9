"""A Triton `ModelConfig` for an artefact, and the check that one fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from export.triton.interface import Interface, Profile, batch_range
from gmconv.cli import require
from gmconv.errors import RefusedError
from runtime.manifest import TensorSpec

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

    `max_batch` None takes the largest batch up to which the engine's profiles take every batch (32 for an ONNX file).
    `warmup_shapes` gives the shape of one request, without the batch where Triton batches, for inputs with dynamic axes
    that no profile and no preprocessing pins down.
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
    limit, high = config.max_batch_size, interface.batch_limit
    if limit and not interface.batched:
        raise RefusedError(f"{where} says max_batch_size {limit}, but of the artefact {interface.unbatched_reason}")
    if high is not None and limit > high:
        raise RefusedError(f"{where} says max_batch_size {limit}, but the engine takes every batch only up to {high}")
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


def batching_note(interface: Interface, limit: int) -> str | None:
    """What a configuration with max_batch_size `limit` leaves out of what the artefact seems to offer, if anything."""
    if not interface.batched:
        reason = interface.unbatched_reason
        return None if reason == "its batch is fixed" else f"not batched: {reason}"
    ends = [batch_range(profile)[1] for profile in interface.profiles]
    if limit and limit == interface.batch_limit and limit < max(ends):
        where = interface.reach.index(limit)
        return (
            f"batches end at {limit}, not at {max(ends)} as profile {ends.index(max(ends))} does: at the shapes of "
            f"profile {where} no profile takes a batch of {limit + 1}"
        )
    return None


def _batch_limit(interface: Interface, options: ServingOptions) -> int:
    if not interface.batched:
        if options.max_batch:
            raise RefusedError(
                f"{interface.source}: {interface.unbatched_reason}, so Triton cannot batch it; leave --max-batch out, "
                f"or export with a dynamic batch"
            )
        return 0
    if options.max_batch == 0:
        return 0
    high = interface.batch_limit
    if high == 0:
        index = interface.reach.index(0)
        which = f"profile {index}" if len(interface.profiles) > 1 else "profile"
        raise RefusedError(
            f"{interface.source}: the engine's {which} starts at batch {batch_range(interface.profiles[index])[0]}, "
            f"Triton sends batches from 1; build with --min 1, or give --max-batch 0"
        )
    limit = options.max_batch or high or DEFAULT_MAX_BATCH
    if high is not None and limit > high:
        within = "" if len(interface.profiles) == 1 else ", up to which every batch fits at the shapes of every profile"
        raise RefusedError(
            f"{interface.source}: --max-batch {limit} is over the engine's profile maximum {high}{within}; "
            f"lower it, or build with --max {limit}"
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
    if not dims and not batched:
        raise RefusedError(
            f"{interface.source}: {spec.name!r} is a scalar, which Triton takes only beside a batch axis; "
            f"export it with the shape [1]"
        )
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
    """One sample for the smallest and the largest batch of each profile, at the shape it was tuned for."""
    unknown = set(options.warmup_shapes) - {s.name for s in interface.inputs}
    if unknown:
        raise RefusedError(f"{interface.source}: has no input {sorted(unknown)[0]!r} to give a --shape for")
    for index, profile in enumerate(interface.profiles or ({},)):
        shapes = {s.name: _warmup_dims(s, profile, interface, options, batched=limit > 0) for s in interface.inputs}
        low, high = batch_range(profile) if limit and profile else (1, limit)
        if low > (limit or 1) or not _holds(profile, shapes):  # over the limit; or another profile holds the --shape
            continue
        for batch in sorted({low, min(high, limit)}) if limit else [1]:  # Triton skips samples of batch 0
            warmup = config.model_warmup.add(batch_size=batch)
            warmup.name = f"batch {batch}" if limit else "one request"
            if len(interface.profiles) > 1:
                warmup.name = f"profile {index}, {warmup.name}"
            for tensor, spec in zip(config.input, interface.inputs, strict=True):
                data = warmup.inputs[spec.name]
                data.data_type = tensor.data_type
                data.dims.extend(shapes[spec.name] or (1,))
                if spec.dtype.startswith(("float", "bfloat")):
                    data.random_data = True
                else:  # random indices could leave an embedding's range
                    data.zero_data = True
    if not config.model_warmup:
        raise RefusedError(f"{interface.source}: no profile of the engine holds the shapes given by --shape")


def _holds(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether shapes, with the batch or without, lie within a profile; the last axes are compared."""
    return all(
        low <= d <= high
        for name, shape in shapes.items()
        if name in profile and shape
        for low, d, high in zip(profile[name].min[-len(shape) :], shape, profile[name].max[-len(shape) :], strict=True)
    )


def _warmup_dims(
    spec: TensorSpec, profile: Profile, interface: Interface, options: ServingOptions, *, batched: bool
) -> tuple[int, ...]:
    dims = _dims(spec, batched=batched)
    candidates: list[tuple[int, ...]] = []
    given = options.warmup_shapes.get(spec.name)
    if given is not None:
        candidates = [given]
    elif -1 not in dims:
        return dims
    else:
        if spec.name in profile:
            candidates.append(profile[spec.name].opt[1 if batched else 0 :])
        for one in interface.usual:
            if one.name == spec.name:
                first = () if batched else (one.shape[0] if isinstance(one.shape[0], int) else 1,)
                candidates.append((*first, *_dims(one, batched=True)))
        if interface.rows_meet:
            candidates.append((1, *dims[1:]))
    for candidate in candidates:
        if (
            len(candidate) == len(dims)
            and -1 not in candidate
            and all(d in (-1, c) for d, c in zip(dims, candidate, strict=True))
        ):
            return candidate
    if given is not None:
        raise RefusedError(f"{interface.source}: --shape {list(given)} does not fit input {spec.name!r}: {list(dims)}")
    batch = not batched and interface.batched
    example = "x".join(str(d if d > 0 else 1 if batch and axis == 0 else 224) for axis, d in enumerate(dims))
    raise RefusedError(
        f"{interface.source}: input {spec.name!r} has dynamic axes {list(dims)}; give a warm-up shape, such as "
        f"--shape {spec.name}={example}, or --no-warmup"
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
