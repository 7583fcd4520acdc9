"""A Triton `config.pbtxt` beside a model: what of it this server does, and what it does not, said by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gmconv.errors import RefusedError
from runtime.serve.settings import Settings

log = logging.getLogger("gmconv.serve")
CONFIG = "config.pbtxt"
ARTEFACT = frozenset(("name", "platform", "backend", "input", "output", "default_model_filename", "parameters"))
"""Fields that describe the artefact. Its manifest does, and the server shows what it found."""
GROUPS = frozenset(("dynamic_batching", "default_queue_policy"))
DONE = frozenset(
    (
        *("max_batch_size", "version_policy", "instance_group", "instance_group.name", "instance_group.count"),
        *("dynamic_batching.max_queue_delay_microseconds", "dynamic_batching.priority_levels"),
        *("dynamic_batching.default_priority_level", "default_queue_policy.max_queue_size"),
        *("default_queue_policy.default_timeout_microseconds", "default_queue_policy.allow_timeout_override"),
    )
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The settings of one model, and which fields of the file the server does not follow."""

    path: Path
    settings: dict[str, Any]
    """Fields of `Settings` that differ for this model."""
    max_batch: int
    """Rows per execution at most; 0: requests are not batched."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Which versions, as the file has it: `all`, `latest` or `specific`."""
    ignored: tuple[str, ...] = ()

    def chosen(self, found: list[str]) -> set[str]:
        """Of the versions found in the folder those that the version policy serves."""
        if "specific" in self.policy:
            return set(found) & set(map(str, self.policy["specific"]["versions"]))
        ordered = sorted(set(found), key=int)
        return set(ordered[-self.policy["latest"]["num_versions"] :] if "latest" in self.policy else ordered)

    def apply(self, settings: Settings) -> Settings:
        """The server's settings with this model's own."""
        return replace(settings, **self.settings)

    def say(self, name: str) -> None:
        """Tell the operator what of the file is done."""
        done = {"max_batch_size": self.max_batch, "version_policy": self.policy, **self.settings}
        said = ", ".join(f"{key} {value}" for key, value in done.items())
        left = f"; not done by this server: {', '.join(self.ignored)}" if self.ignored else ""
        log.info("%s: %s: %s%s", name, CONFIG, said, left)


def read_config(path: Path) -> ModelConfig:
    """The configuration in a file. Raises RefusedError where it is no ModelConfig."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(path.read_text("utf-8"), config)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise RefusedError(f"{path}: not a Triton model configuration ({str(error)[:200]})") from error
    if config.max_batch_size < 0:
        raise RefusedError(f"{path}: max_batch_size {config.max_batch_size} is negative")
    ignored = set(_fields(config, "")) - ARTEFACT - DONE
    for group in config.instance_group:
        ignored |= {f"instance_group.{descriptor.name}" for descriptor, _ in group.ListFields()} - DONE
    settings: dict[str, Any] = {}
    if config.HasField("dynamic_batching"):
        settings = _batching(config.dynamic_batching)
    if config.instance_group:
        settings["instances"] = min(sum(max(1, group.count) for group in config.instance_group), 64)
    return ModelConfig(path, settings, config.max_batch_size, _policy(config.version_policy), tuple(sorted(ignored)))


def _fields(message: Any, group: str) -> Iterator[str]:
    """The names of the fields that are there, those of a group after its own name."""
    for descriptor, value in message.ListFields():
        if descriptor.name in GROUPS:
            yield from _fields(value, f"{descriptor.name}.")
        else:
            yield group + descriptor.name


def _policy(policy: Any) -> dict[str, Any]:
    """Triton serves the highest version alone where no policy is given."""
    kind = policy.WhichOneof("policy_choice")
    if kind == "specific":
        return {"specific": {"versions": list(policy.specific.versions)}}
    return {"all": {}} if kind == "all" else {"latest": {"num_versions": policy.latest.num_versions or 1}}


def _batching(batching: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_queue_delay": batching.max_queue_delay_microseconds / 1e6}
    if levels := min(batching.priority_levels, 100):
        settings |= {"priority_levels": levels, "default_priority": min(batching.default_priority_level, 100)}
    if batching.HasField("default_queue_policy"):
        policy = batching.default_queue_policy
        settings["timeout_override"] = policy.allow_timeout_override
        settings |= {"queue_size": policy.max_queue_size} if policy.max_queue_size else {}
        if timeout := policy.default_timeout_microseconds:
            settings["queue_timeout"] = timeout / 1e6
    return settings
