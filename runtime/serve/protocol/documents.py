"""The protocol's documents about server and models: metadata, configuration, statistics, settings.

Each is built once as the protobuf message that gRPC returns; REST gets the same message as JSON, with 64-bit integers
as numbers, as Triton writes them.
"""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2, service_pb2

from runtime.manifest import own_version
from runtime.serve.errors import Code, RequestError
from runtime.serve.models.config import ModelConfig
from runtime.serve.models.repository import Repository
from runtime.serve.models.source import device_for
from runtime.serve.models.version import ModelVersion
from runtime.serve.observe.stats import Timer
from runtime.serve.protocol.signature import TO_TRITON, Port

SERVER_NAME, VERSION = "gmconv-deploy", own_version()
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "statistics",
    "logging",
    "model_repository(index)",
)
_CONFIG_TYPES = {v: f"TYPE_{v}" for v in TO_TRITON.values()}


def server_metadata() -> Any:
    """ServerMetadataResponse."""
    return service_pb2.ServerMetadataResponse(name=SERVER_NAME, version=VERSION, extensions=EXTENSIONS)


def model_metadata(model: ModelVersion, repository: Repository) -> Any:
    """ModelMetadataResponse; shapes include the batch axis, -1 where dynamic."""
    answer = service_pb2.ModelMetadataResponse(
        name=model.source.name, versions=repository.versions(model.source.name), platform=model.platform
    )
    for ports, entries in (
        (model.signature.inputs, answer.inputs),
        (model.signature.outputs, answer.outputs),
    ):
        for port in ports.values():
            entries.add(name=port.name, datatype=port.datatype, shape=port.shape)
    return answer


def model_config(model: ModelVersion) -> Any:
    """ModelConfig as a Triton repository would hold it: dims without the batch axis."""
    settings = model.settings
    signature = model.signature
    config = model_config_pb2.ModelConfig(
        name=model.source.name,
        platform=model.platform,
        backend="tensorrt" if model.platform == "tensorrt_plan" else "onnxruntime",
        max_batch_size=signature.max_rows,
        version_policy=_version_policy(model.source.config),
        default_model_filename=model.source.path.name,
    )

    def dims(port: Port) -> tuple[int, ...]:
        return port.shape[1:] if signature.max_rows else port.shape

    for port in signature.inputs.values():
        config.input.add(name=port.name, data_type=_CONFIG_TYPES[port.datatype], dims=dims(port))
    for port in signature.outputs.values():
        config.output.add(
            name=port.name,
            data_type=_CONFIG_TYPES[port.datatype],
            dims=dims(port),
            label_filename="labels.txt" if signature.labels else "",
        )
    kind = model_config_pb2.ModelInstanceGroup
    config.instance_group.add(
        name=f"{model.source.name}_0",
        count=settings.instances,
        kind=kind.KIND_CPU if device_for(model.source, settings) == "cpu" else kind.KIND_GPU,
    )
    if signature.max_rows:
        batching = config.dynamic_batching
        batching.max_queue_delay_microseconds = int(settings.max_queue_delay * 1e6)
        batching.priority_levels = settings.priority_levels
        batching.default_priority_level = settings.default_priority or (settings.priority_levels + 1) // 2
        queue = batching.default_queue_policy
        queue.max_queue_size = settings.queue_size
        queue.default_timeout_microseconds = int(settings.queue_timeout * 1e6)
        queue.allow_timeout_override = settings.timeout_override
    if model.manifest:
        config.parameters["sha256"].string_value = model.sha256
        config.parameters["precision"].string_value = model.manifest.precision
    return config


def _version_policy(config: ModelConfig | None) -> Any:
    policy = model_config_pb2.ModelVersionPolicy
    if config and config.versions is not None:
        return policy(specific=policy.Specific(versions=sorted(map(int, config.versions))))
    if config and config.latest:
        return policy(latest=policy.Latest(num_versions=config.latest))
    return policy(all=policy.All())


def statistics(models: list[ModelVersion]) -> Any:
    """ModelStatisticsResponse."""
    answer = service_pb2.ModelStatisticsResponse()
    for model in models:
        stats = model.stats
        entry = answer.model_stats.add(
            name=model.source.name,
            version=model.source.version,
            last_inference=stats.last_inference_ms,
            inference_count=stats.inferences,
            execution_count=stats.executions,
        )
        counters = entry.inference_stats
        for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
            _fill(getattr(counters, name), getattr(stats, name))
        _fill(counters.cache_hit, Timer())
        _fill(counters.cache_miss, Timer())
        for size in sorted(stats.batches):
            batch = entry.batch_stats.add(batch_size=size)
            for name, timer in zip(
                ("compute_input", "compute_infer", "compute_output"), stats.batches[size], strict=True
            ):
                _fill(getattr(batch, name), timer)
    return answer


def _fill(duration: Any, timer: Timer) -> None:
    duration.count, duration.ns = timer.count, timer.ns


def openapi(document: bytes, *, secured: bool) -> bytes:
    """The OpenAPI document with this package's version and, where a token is asked for, the bearer scheme."""
    described = json.loads(document)
    described["info"]["version"] = VERSION
    if secured:
        described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
    return json.dumps(described).encode()


def to_dict(message: Message) -> dict[str, Any]:
    """A message as REST shows it: every field present, snake_case, 64-bit integers as numbers."""
    raw = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {name: _numbers(value, message.DESCRIPTOR.fields_by_name.get(name)) for name, value in raw.items()}


_INT64 = {3, 4, 6, 16, 18}  # FieldDescriptor TYPE_INT64, UINT64, FIXED64, SFIXED64, SINT64


def _numbers(value: Any, field: Any) -> Any:
    if field is None:
        return value
    if isinstance(value, list):
        return [_numbers(v, field) for v in value]
    if isinstance(value, str) and field.type in _INT64:
        return int(value)
    if isinstance(value, dict) and field.message_type is not None:
        inner = field.message_type
        if inner.GetOptions().map_entry:
            return {k: _numbers(v, inner.fields_by_name["value"]) for k, v in value.items()}
        return {k: _numbers(v, inner.fields_by_name.get(k)) for k, v in value.items()}
    return value


class LogSettings:
    """Triton's logging settings. `log_info` switches the access log; there is no file to be named over the network."""

    def __init__(self, access_log: bool) -> None:
        self.values: dict[str, str | bool | int] = {
            "log_file": "",
            "log_info": access_log,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "default",
        }

    def update(self, changes: dict[str, Any]) -> None:
        """Apply all of `changes` or none; raises RequestError."""
        for key, value in changes.items():
            if key not in self.values:
                raise RequestError(f"unknown log setting '{key[:40]}'")
            if type(value) is not type(self.values[key]):
                raise RequestError(f"log setting '{key}' must be a {type(self.values[key]).__name__}")
            if key != "log_info" and value != self.values[key]:
                raise RequestError(f"log setting '{key}' cannot be changed over the network", Code.UNSUPPORTED)
        self.values.update(changes)


TRACE_SETTINGS: dict[str, tuple[str, ...]] = {
    "trace_level": ("OFF",),
    "trace_rate": ("1000",),
    "trace_count": ("-1",),
    "log_frequency": ("0",),
    "trace_file": ("",),
    "trace_mode": ("opentelemetry",),
}


def trace_settings(otel: bool) -> dict[str, tuple[str, ...]]:
    """Triton's trace settings: on when the server was started with --otel."""
    return {**TRACE_SETTINGS, "trace_level": ("TIMESTAMPS",)} if otel else dict(TRACE_SETTINGS)


def check_trace_update(changes: dict[str, Any], otel: bool) -> None:
    """Accept what is already so (null means "the default"), refuse the rest; raises RequestError."""
    present = trace_settings(otel)
    for key, value in changes.items():
        if key not in present:
            raise RequestError(f"unknown trace setting '{key[:40]}'")
        wanted = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
        if value not in (None, [], ()) and wanted != list(present[key]):
            raise RequestError(
                f"trace setting '{key}' is chosen when the server starts (--otel), not over the network",
                Code.UNSUPPORTED,
            )
