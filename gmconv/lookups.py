"""Which whole numbers choose rows of a table, and how many rows it has: seen in one run of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gmconv.eager import as_written
from gmconv.inputs import Input, noise, tensors_of

#: Operators that pass whole numbers on as they are.
_PASSING = {
    *("_reshape_alias", "_to_copy", "_unsafe_view", "alias", "clone", "detach", "expand", "lift_fresh", "permute"),
    *("reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze"),
    "view",
}


def table_ends(model: nn.Module, inputs: Sequence[Input], samples: int = 2) -> dict[str, tuple[int, int]]:
    """First and last row, for those inputs that choose rows of something by number: an embedding, a tensor's index.

    Of several the shortest; nothing of a network that does not run on `samples` samples of noise.
    """
    if not any(given.dtype.startswith(("int", "uint")) for given in inputs):
        return {}
    tensors = tensors_of(model, inputs, noise(inputs, samples))
    seen = _Lookups({given.name: tensor for given, tensor in zip(inputs, tensors, strict=True)})
    try:
        with torch.no_grad(), as_written(), seen:
            model(*tensors)
    except Exception:  # whatever a forward raises; who runs it in earnest says so
        return {}
    return {name: (0, length - 1) for name, length in seen.lengths.items()}


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows whole numbers from the inputs to the operators that index with them. `lengths`: of what, by input."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lengths: dict[str, int] = {}
        #: By id, the tensor (kept, so that no other gets its id) and the input that its numbers come from.
        self._from = {id(t): (t, name) for name, t in tensors.items() if not t.is_floating_point()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and note what it looks up."""
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
            self._note(args[1], args[0].shape[0])
        elif name in ("index_select", "gather", "scatter", "scatter_"):
            self._note(args[2], args[0].shape[args[1]])
        elif name == "index":
            for axis, chosen in enumerate(args[1]):
                self._note(chosen, args[0].shape[axis])
        elif name in _PASSING and id(args[0]) in self._from:
            source = self._from[id(args[0])][1]
            self._from |= {id(t): (t, source) for t in tree_leaves(found) if isinstance(t, Tensor)}
        return found

    def _note(self, chosen: Tensor | None, length: int) -> None:
        if chosen is not None and chosen.dtype != torch.bool and id(chosen) in self._from:
            name = self._from[id(chosen)][1]
            self.lengths[name] = min(length, self.lengths.get(name, length))
