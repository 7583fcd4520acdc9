"""The state of a training run after an epoch: all that the next one needs to be what it would have been."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gmconv.checkpoint.file import read_file
from gmconv.errors import CheckpointError, RefusedError
from gmconv.files import replacing, unwritable
from gmconv.train.options import output_path

if TYPE_CHECKING:
    from gmconv.train.data import Dataset

STATE_SCHEMA = "gmconv-deploy.training/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """`options` are those of `TrainOptions` without the data's place; `data` tells whether it is the same data.

    `history`: each epoch so far; `layers` of the best one, as `LayerReach` says; `random`: the generators' states.
    """

    options: dict[str, Any]
    data: dict[str, Any]
    history: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    random: dict[str, Any]


def random_state(device: str) -> dict[str, Any]:
    """The state of torch's generators."""
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if device == "cuda" else {})}


def restore_random(state: Mapping[str, Any], device: str) -> None:
    """Go on drawing where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if device == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def data_identity(data: Dataset) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    counts = [len(data.train.targets), len(data.held_out.targets)]
    return {"labels": list(data.labels), "samples": counts, "record": data.record}


def write_state(path: Path, state: RunState) -> None:
    """Atomically. Raises CheckpointError; UnavailableError where the disk is full."""
    try:
        with replacing(path) as stream:
            fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
            torch.save({"schema": STATE_SCHEMA, **fields}, stream)
    except RefusedError as error:
        raise CheckpointError(error.message) from error
    except (OSError, RuntimeError) as error:
        raise unwritable(path, error, refused=CheckpointError) from error


def read_state(path: Path) -> RunState:
    """Nothing in the file runs code. Raises CheckpointError where it is no state of a training run."""
    if (output := output_path(path)).is_file() and not path.exists():
        raise CheckpointError(f"{path}: no such file; the run that wrote {output} is done")
    raw = read_file(path)
    fields: dict[str, Any] = {field.name: raw.get(field.name) for field in dataclasses.fields(RunState)}
    if raw.get("schema") != STATE_SCHEMA or None in fields.values():
        raise CheckpointError(f"{path}: is no state of a training run of this version; begin again")
    return RunState(**fields)
