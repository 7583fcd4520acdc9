"""What a network returns, as named tensors: one rule for the live network, the graph and what was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from gmconv.errors import RefusedError


def named_outputs(value: Any, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors in a return value of any nesting, by name, in the order of the tree; other leaves are left out.

    A tensor alone is `logits`, the i-th of a tuple `output_i`; entries of dicts have their keys, deeper ones the path
    to them: `aux.scores`, `maps.0`. `names` replaces the names of outputs without keys, in order; outputs with keys
    keep theirs, so there `names` has to list them (in any order).

    Raises:
        RefusedError: no tensors, another count of names, or names that are not the keys.
    """
    leaves, _ = pytree.tree_flatten_with_path(value)
    found = {path: leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
    if not found:
        raise RefusedError(f"the network returns a {type(value).__name__} without tensors; nothing to export")
    keyed = any(not isinstance(part, pytree.SequenceKey) for path in found for part in path)
    own = [_name(path) for path in found]
    if len(own) == 1 and not keyed:
        own = ["logits"]
    if names and len(names) != len(own):
        raise RefusedError(f"the network has {len(own)} outputs, --output-names gives {len(names)}; name each")
    if names and keyed and set(names) != set(own):
        raise RefusedError(
            f"the network names its outputs itself: {', '.join(own)}; --output-names says {', '.join(names)}: leave it "
            f"out, or list those"
        )
    if names and not keyed:
        own = list(names)
    return dict(zip(own, found.values(), strict=True))


def _name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path]
    if path and isinstance(path[0], pytree.SequenceKey):
        parts[0] = f"output_{parts[0]}"
    return ".".join(parts)
