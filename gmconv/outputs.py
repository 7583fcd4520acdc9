"""What a network returns, as named tensors: one rule for the live network, the graph and what was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, bfloat16, nn, strided
from torch.utils import _pytree as pytree

from gmconv.errors import RefusedError, printable, type_words

_SAME = 1e-3  # of the RMS: far beyond what another number of threads changes
_PLAIN = (bool, int, float, str, bytes)


def named_outputs(value: Any, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors in a return value of any nesting, by name, in the order of the tree; other leaves are left out.

    A tensor alone is `logits`, the i-th of a tuple `output_i`; entries of dicts have their keys, deeper ones the path
    to them: `aux.scores`, `maps.0`. `names` replaces the names of outputs without keys, in order; outputs with keys
    keep theirs, so there `names` has to list them (in any order).

    Raises:
        RefusedError: no tensors, another count of names, or names that are not the keys.
    """
    found = {path: leaf for path, leaf in _leaves(value) if isinstance(leaf, Tensor)}
    if not found:
        raise RefusedError(f"the network returns {type_words(value)} without tensors; nothing to export")
    keyed = any(not isinstance(part, pytree.SequenceKey) for path in found for part in path)
    own = [_name(path) for path in found]
    if len(own) == 1 and not keyed:
        own = ["logits"]
    if names and len(names) != len(own):
        raise RefusedError(
            f"the network has {len(own)} outputs, --output-names gives {len(names)}; name each, and return as many for "
            f"every batch"
        )
    if names and keyed and set(names) != set(own):
        raise RefusedError(
            f"the network names its outputs itself: {', '.join(own)}; --output-names says {', '.join(names)}: leave it "
            f"out, or list those"
        )
    if names and not keyed:
        own = list(names)
    return dict(zip(own, found.values(), strict=True))


def refuse_unshippable(named: Mapping[str, Tensor]) -> None:
    """Raise RefusedError for an output that neither numpy nor ONNX Runtime could give back."""
    for name, tensor in named.items():
        if tensor.is_complex() or tensor.layout != strided:
            kind, way = ("complex", "torch.view_as_real(y)") if tensor.is_complex() else ("sparse", "y.to_dense()")
            raise RefusedError(f"output {printable(name)!r} is {kind}, which no artefact gives back: return {way}")
        if tensor.dtype == bfloat16:
            raise RefusedError(
                f"output {printable(name)!r} is in bfloat16 (autocast in the forward?), which numpy and ONNX Runtime "
                f"have not: let the forward return it as float32 (.float())"
            )


def output_tensors(value: Any) -> list[Tensor]:
    """The tensors in a return value of any nesting, in the order of `named_outputs`."""
    return [leaf for _, leaf in _leaves(value) if isinstance(leaf, Tensor)]


def unlike(here: Mapping[str, NDArray[Any]], there: Mapping[str, NDArray[Any]]) -> tuple[str, float] | None:
    """Of two runs on one batch: an output that differs by more than threads explain, and by what share of its RMS."""
    for name in here.keys() & there.keys():
        left, right = (side[name].astype("float64") for side in (here, there))
        if left.shape != right.shape or here[name].dtype.kind != "f":  # a class may flip where two are as good
            continue
        scale, off = (float((values**2).mean()) ** 0.5 for values in (right, left - right))
        if off > _SAME * scale > 0:
            return name, off / scale
    return None


def left_out(value: Any) -> list[str]:
    """What else is in a return value, in words: "stride (8)", "boxes (a Boxes)"; None is nothing."""
    return [
        f"{_name(path)} ({printable(repr(leaf), 40) if isinstance(leaf, _PLAIN) else type_words(leaf)})"
        for path, leaf in _leaves(value)
        if leaf is not None and not isinstance(leaf, Tensor)
    ]


@contextmanager
def tensors_alone(model: nn.Module) -> Iterator[None]:
    """`model` returns a tuple of its tensors where it returns anything else too, which no exporter takes."""

    def only(_: object, __: object, value: Any) -> Any:
        given, _ = pytree.tree_flatten(value)
        return None if all(isinstance(leaf, Tensor) for leaf in given) else tuple(output_tensors(value))

    handle = model.register_forward_hook(only)
    try:
        yield
    finally:
        handle.remove()


def _leaves(value: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The leaves with their paths; a dataclass, and a mapping that torch does not know, is like a dict."""
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_map(_opened, value))
    return leaves


def _opened(leaf: Any) -> Any:
    if is_dataclass(leaf) and not isinstance(leaf, type):
        leaf = {field.name: getattr(leaf, field.name) for field in fields(leaf)}
    elif not isinstance(leaf, Mapping):
        return leaf
    return pytree.tree_map(_opened, dict(leaf))


def _name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path]
    if path and isinstance(path[0], pytree.SequenceKey):
        parts[0] = f"output_{parts[0]}"
    return ".".join(parts)
