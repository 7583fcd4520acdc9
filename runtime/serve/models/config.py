"""A Triton `config.pbtxt` beside a model: what of it this server does, and what it does not, said by name."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gmconv.errors import RefusedError
from runtime.serve.settings import Settings

log = logging.getLogger("gmconv.serve")
CONFIG = "config.pbtxt"
SILENT = frozenset(("name", "platform", "backend", "input", "output", "default_model_filename", "parameters"))
"""Fields that describe the artefact. Its manifest does, and the server shows what it found."""
BATCHING = frozenset(
    ("max_queue_delay_microseconds", "priority_levels", "default_priority_level", "default_queue_policy")
)
QUEUE = frozenset(("max_queue_size", "default_timeout_microseconds", "allow_timeout_override", "timeout_action"))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The settings of one model. `honoured` and `ignored` are what the server says about them when it starts."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of `Settings` that differ for this model."""
    max_batch: int | None = None
    """Rows per execution at most; 0: requests are not batched."""
    versions: frozenset[str] | None = None
    """Which versions; None: see `latest`."""
    latest: int = 0
    """How many of the highest versions; 0: all."""
    honoured: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def chosen(self, found: list[str]) -> set[str]:
        """Of the versions found in the folder those that the version policy serves."""
        if self.versions is not None:
            return set(found) & self.versions
        ordered = sorted(set(found), key=int)
        return set(ordered[-self.latest :] if self.latest else ordered)

    def apply(self, settings: Settings) -> Settings:
        """The server's settings with this model's own."""
        return replace(settings, **self.settings)

    def say(self, name: str) -> None:
        """Tell the operator what of the file is done."""
        done = "; ".join(self.honoured) or "nothing that this server does"
        left = f"; not done by this server: {', '.join(self.ignored)}" if self.ignored else ""
        log.info("%s: %s: %s%s", name, CONFIG, done, left)


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
    present = {descriptor.name: value for descriptor, value in config.ListFields()}
    settings: dict[str, Any] = {}
    honoured = [f"max_batch_size {config.max_batch_size}"]
    ignored = sorted(set(present) - SILENT - {"max_batch_size", "version_policy", "instance_group", "dynamic_batching"})
    versions, latest = _versions(config.version_policy, honoured)
    if "dynamic_batching" in present:
        _batching(config.dynamic_batching, settings, honoured, ignored)
    if "instance_group" in present:
        _instances(config.instance_group, settings, honoured, ignored)
    return ModelConfig(path, settings, config.max_batch_size, versions, latest, tuple(honoured), tuple(ignored))


def _versions(policy: Any, honoured: list[str]) -> tuple[frozenset[str] | None, int]:
    """Triton serves the highest version alone where no policy is given."""
    kind = policy.WhichOneof("policy_choice")
    if kind == "specific":
        versions = [str(v) for v in policy.specific.versions]
        honoured.append(f"versions {', '.join(versions)}")
        return frozenset(versions), 0
    if kind == "all":
        honoured.append("all versions")
        return None, 0
    latest = (policy.latest.num_versions if kind else 0) or 1
    honoured.append(f"the latest {latest} version{'s' if latest > 1 else ''}")
    return None, latest


def _batching(batching: Any, settings: dict[str, Any], honoured: list[str], ignored: list[str]) -> None:
    fields = {descriptor.name for descriptor, _ in batching.ListFields()}
    ignored += sorted(f"dynamic_batching.{name}" for name in fields - BATCHING)
    settings["max_queue_delay"] = batching.max_queue_delay_microseconds / 1e6
    honoured.append(f"max_queue_delay {batching.max_queue_delay_microseconds} us")
    if levels := int(min(batching.priority_levels, 100)):
        settings |= {"priority_levels": levels, "default_priority": int(min(batching.default_priority_level, 100))}
        honoured.append(f"{levels} priority levels")
    if "default_queue_policy" not in fields:
        return
    policy = batching.default_queue_policy
    given = {descriptor.name for descriptor, _ in policy.ListFields()}
    ignored += sorted(f"default_queue_policy.{name}" for name in given - QUEUE)
    if policy.timeout_action:  # DELAY; what is late is refused here
        ignored.append("default_queue_policy.timeout_action DELAY")
    if size := policy.max_queue_size:
        settings["queue_size"] = size
        honoured.append(f"max_queue_size {size}")
    if timeout := policy.default_timeout_microseconds:
        settings["queue_timeout"] = timeout / 1e6
        honoured.append(f"queue timeout {timeout} us")
    settings["timeout_override"] = policy.allow_timeout_override
    honoured.append(f"timeout override {'allowed' if policy.allow_timeout_override else 'not allowed'}")


def _instances(groups: Any, settings: dict[str, Any], honoured: list[str], ignored: list[str]) -> None:
    count = sum(max(1, group.count) for group in groups)
    settings["instances"] = min(count, 64)
    honoured.append(f"{settings['instances']} instance{'s' if count > 1 else ''}")
    for group in groups:
        fields = {descriptor.name for descriptor, _ in group.ListFields()} - {"name", "count", "kind"}
        ignored += sorted(f"instance_group.{name}" for name in fields)
    ignored += sorted({"instance_group.kind (see --device)" for group in groups if group.kind})
