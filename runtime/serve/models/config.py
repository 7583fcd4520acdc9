"""A Triton `config.pbtxt` beside a model: what of it this server does, and what it does not, said by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmconv.errors import RefusedError
from runtime.serve.settings import Settings

log = logging.getLogger("gmconv.serve")
CONFIG = "config.pbtxt"
ARTEFACT = ("name", "platform", "backend", "input", "output", "default_model_filename", "parameters")
"""Fields that describe the artefact. Its manifest does, and the server shows what it found."""
GROUPS = ("dynamic_batching", "default_queue_policy", "instance_group")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The settings of one model, and which fields of the file the server does not follow."""

    settings: dict[str, Any]
    """Fields of `Settings` that differ for this model."""
    max_batch: int
    """Rows per execution at most; 0: requests are not batched."""
    policy: dict[str, Any]
    """Which versions, as the file has it: `all`, `latest` or `specific`."""
    ignored: tuple[str, ...]

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
    from google.protobuf.json_format import MessageToDict
    from tritonclient.grpc import model_config_pb2

    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(path.read_text("utf-8"), config)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise RefusedError(f"{path}: not a Triton model configuration ({str(error)[:200]})") from error
    if config.max_batch_size < 0:
        raise RefusedError(f"{path}: max_batch_size {config.max_batch_size} is negative")
    left = MessageToDict(config, preserving_proto_field_name=True)  # what is understood is taken out of it
    for name in ARTEFACT:
        left.pop(name, None)
    max_batch, policy = left.pop("max_batch_size", 0), _policy(left.pop("version_policy", {}))
    settings = _batching(left["dynamic_batching"]) if "dynamic_batching" in left else {}
    if groups := left.pop("instance_group", []):
        settings["instances"] = min(sum(max(1, group.pop("count", 0)) for group in groups), 64)
        left["instance_group"] = {key: None for group in groups for key in group if key != "name"}
    return ModelConfig(settings, max_batch, policy, tuple(sorted(_names(left))))


def _policy(policy: dict[str, Any]) -> dict[str, Any]:
    """Triton serves the highest version alone where no policy is given."""
    if "specific" in policy:
        return {"specific": {"versions": [int(version) for version in policy["specific"].get("versions", ())]}}
    return policy if "all" in policy else {"latest": {"num_versions": 1, **policy.get("latest", {})}}


def _batching(batching: dict[str, Any]) -> dict[str, Any]:
    """Takes out of `batching` what it becomes settings of; protobuf's JSON has 64-bit numbers as text."""
    settings: dict[str, Any] = {"max_queue_delay": int(batching.pop("max_queue_delay_microseconds", 0)) / 1e6}
    usual = min(int(batching.pop("default_priority_level", 0)), 100)
    if levels := min(int(batching.pop("priority_levels", 0)), 100):
        settings |= {"priority_levels": levels, "default_priority": usual}
    if (policy := batching.get("default_queue_policy")) is not None:
        settings["timeout_override"] = policy.pop("allow_timeout_override", False)
        if size := policy.pop("max_queue_size", 0):
            settings["queue_size"] = size
        if timeout := int(policy.pop("default_timeout_microseconds", 0)):
            settings["queue_timeout"] = timeout / 1e6
    return settings


def _names(left: dict[str, Any], group: str = "") -> Iterator[str]:
    """The names of the fields that are left, those of a group after its own name."""
    for name, value in left.items():
        if name in GROUPS:
            yield from _names(value, f"{name}.")
        else:
            yield group + name
