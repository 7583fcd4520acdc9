"""The protocol's documents about server and models, as REST shows them; gRPC parses its messages from the same."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from gmconv.version import __version__
from runtime.serve.errors import Code, RequestError
from runtime.serve.models.repository import Repository
from runtime.serve.models.source import device_for
from runtime.serve.models.version import ModelVersion
from runtime.serve.observe.stats import STAGES, Timer
from runtime.serve.protocol.signature import Port

Document = dict[str, Any]

SERVER: Document = {
    "name": "gmconv-deploy",
    "version": __version__,
    "extensions": [
        *("binary_tensor_data", "classification", "model_configuration", "parameters", "schedule_policy"),
        *("statistics", "logging", "model_repository(index)"),
    ],
}


def model_metadata(model: ModelVersion, repository: Repository) -> Document:
    """Names and tensors; shapes include the batch axis, -1 where dynamic."""

    def tensors(ports: dict[str, Port]) -> list[Document]:
        return [{"name": p.name, "datatype": p.datatype, "shape": list(p.shape)} for p in ports.values()]

    return {
        "name": model.source.name,
        "versions": repository.versions(model.source.name),
        "platform": model.platform,
        "inputs": tensors(model.signature.inputs),
        "outputs": tensors(model.signature.outputs),
    }


def model_config(model: ModelVersion) -> Document:
    """ModelConfig as a Triton repository would hold it: dims without the batch axis."""
    source, settings, signature = model.source, model.settings, model.signature

    def tensors(ports: dict[str, Port], **more: str) -> list[Document]:
        first = 1 if signature.max_rows else 0
        return [
            {"name": p.name, "data_type": f"TYPE_{p.datatype}", "dims": list(p.shape[first:]), **more}
            for p in ports.values()
        ]

    kind = "KIND_CPU" if device_for(source, settings) == "cpu" else "KIND_GPU"
    config: Document = {
        "name": source.name,
        "platform": model.platform,
        "backend": source.runtime,
        "max_batch_size": signature.max_rows,
        "version_policy": source.config.policy if source.config else {"all": {}},
        "default_model_filename": source.path.name,
        "input": tensors(signature.inputs),
        "output": tensors(signature.outputs, label_filename="labels.txt" if signature.labels else ""),
        "instance_group": [{"name": f"{source.name}_0", "count": settings.instances, "kind": kind}],
    }
    if signature.max_rows:
        config["dynamic_batching"] = {
            "max_queue_delay_microseconds": int(settings.max_queue_delay * 1e6),
            "priority_levels": settings.priority_levels,
            "default_priority_level": settings.usual_priority,
            "default_queue_policy": {
                "max_queue_size": settings.queue_size,
                "default_timeout_microseconds": int(settings.queue_timeout * 1e6),
                "allow_timeout_override": settings.timeout_override,
            },
        }
    if model.manifest:
        notes = {"sha256": model.manifest.artefact.sha256, "precision": model.manifest.precision}
        config["parameters"] = {key: {"string_value": value} for key, value in notes.items()}
    return config


def statistics(models: list[ModelVersion]) -> Document:
    """What each version has done so far, times in ns."""
    return {"model_stats": [_statistics(model) for model in models]}


def _statistics(model: ModelVersion) -> Document:
    stats = model.stats
    timers = {"success": stats.success, "fail": stats.fail, "queue": stats.queue}
    timers |= zip(STAGES, stats.compute, strict=True)
    timers |= dict.fromkeys(("cache_hit", "cache_miss"), Timer())
    return {
        "name": model.source.name,
        "version": model.source.version,
        "last_inference": stats.last_inference_ms,
        "inference_count": stats.inferences,
        "execution_count": stats.executions,
        "inference_stats": {name: asdict(timer) for name, timer in timers.items()},
        "batch_stats": [
            {"batch_size": size, **{name: asdict(timer) for name, timer in zip(STAGES, batch, strict=True)}}
            for size, batch in sorted(stats.batches.items())
        ],
    }


def openapi(document: bytes, *, secured: bool) -> bytes:
    """The OpenAPI document with this package's version and, where a token is asked for, the bearer scheme."""
    described = json.loads(document)
    described["info"]["version"] = __version__
    if secured:
        described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
    return json.dumps(described).encode()


def log_settings(access_log: bool) -> Document:
    """Triton's logging settings. `log_info` switches the access log; the others are there to be read."""
    shown = {"log_warning": True, "log_error": True, "log_verbose_level": 0, "log_format": "default"}
    return {"log_file": "", "log_info": access_log, **shown}


def change_log_settings(settings: Document, changes: Document) -> None:
    """Apply all of `changes` or none; raises RequestError."""
    for key, value in changes.items():
        if key not in settings or type(value) is not type(settings[key]):
            raise RequestError(f"there is no log setting '{key[:40]}', or it has another type")
        if key != "log_info" and value != settings[key]:
            raise RequestError(f"log setting '{key}' cannot be changed over the network", Code.UNSUPPORTED)
    settings.update(changes)
