"""Which samples of a data set were held out of training: split, recorded in the checkpoint, and found again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError
from gmconv.packages import require

Labels = NDArray[np.int64]
Part = Literal["held-out", "train", "all"]

_SAMPLE = 64  # entries by which a data set is known again after a change
_ALIKE = _SAMPLE // 4  # of them; equal names and sizes of other small files come by chance


def split_indices(targets: Labels, test_size: Any, seed: Any) -> tuple[Labels, Labels]:
    """Indices for training and held out: stratified by class, the same for the same seed.

    Raises RefusedError when there are too few samples to have every class on both sides, or the values are no split.
    """
    split = require("sklearn.model_selection", "export").train_test_split
    try:
        train, held_out = split(np.arange(len(targets)), test_size=test_size, random_state=seed, stratify=targets)
    except (ValueError, TypeError) as error:
        raise RefusedError(
            f"{len(targets)} samples cannot be split with every class on both sides (test_size {test_size!r}, "
            f"split_seed {seed!r}: {error})"
        ) from error
    return np.asarray(train, np.int64), np.asarray(held_out, np.int64)


def split_record(kind: str, entries: Sequence[str], test_size: float, seed: int) -> dict[str, Any]:
    """What a checkpoint keeps of a random split of data that has no name of its own: how, and of what.

    `entries` say of each sample, in order, which it is. Kept are their digest and the hashes of a few, no names.
    """
    hashes = sorted(map(_hash, entries))[:_SAMPLE]
    return {
        "name": kind,
        "test_size": test_size,
        "split_seed": seed,
        "samples": len(entries),
        "digest": _digest(entries),
        "sample": hashes,
    }


def recognize(record: Mapping[str, Any], entries: Sequence[str]) -> Literal["same", "changed", "other"]:
    """Whether `entries` are those of the record, some of them and others, or none to speak of."""
    sample = record.get("sample")
    if not isinstance(sample, list | tuple):
        return "other"
    if record.get("digest") == _digest(entries):
        return "same"
    again = set(map(_hash, entries)) & {str(one) for one in sample}
    return "changed" if len(again) >= min(_ALIKE, max(1, len(sample) // 4)) else "other"


def _digest(entries: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(entries).encode(errors="surrogateescape")).hexdigest()


def _hash(entry: str) -> str:
    return hashlib.sha256(entry.encode(errors="surrogateescape")).hexdigest()[:12]
