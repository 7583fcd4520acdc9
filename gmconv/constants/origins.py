"""What each tensor of a running network was computed from, kept by storage: an upper bound, whatever autograd thinks.

Views, in-place writes, `.data`, custom autograd functions and state left over from an earlier run all end up in a
storage, so nothing of that is missed. What leaves the tensors for Python (`item`, `numpy`, a selection by value) is
called an escape and noted with the module in which it happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

INPUT, RANDOM = "(the input)", "(random numbers)"
_TO_PYTHON = frozenset(
    {"numpy", "tolist", "__array__", "__dlpack__", "to_dlpack", "data_ptr", "storage", "untyped_storage"}
    | {"__repr__", "__format__", "apply_", "map_", "map2_"}
)
_COLLECT = frozenset({"tensor", "as_tensor", "asarray", "new_tensor"})  # read the tensors in a list below dispatch
_ATTRIBUTE = "_gmconv_origin"  # on the storage itself: it goes with it
_NOT_READ = ("_assert", "record_stream", "_record_function")


class Origin(NamedTuple):
    """Names of parameters, buffers, `INPUT` and `RANDOM`, and the operators in between; of the input only `INPUT`."""

    sources: frozenset[str] = frozenset()
    operators: frozenset[str] = frozenset()

    @property
    def varies(self) -> bool:
        """Whether the values may differ from one run to the next."""
        return bool(self.sources & {INPUT, RANDOM})


_NOTHING = Origin()
_FROM_INPUT = Origin(frozenset([INPUT]))


@dataclass(frozen=True, slots=True)
class _Operator:
    """What the schema of an operator says."""

    name: str
    reads: bool  # False: only shape and type of its tensors, as in zeros_like
    computes: bool  # False: its result is a view
    draws: Callable[..., bool]
    selects: bool  # the shape of its result depends on values
    written: tuple[int, ...]  # arguments that it writes to


class Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the origin of every storage while it is the active mode.

    `escapes` are places where values that depend on the input, or random ones, reached Python; `where` is called for
    their name.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # True would import torch._dynamo, which takes seconds
        return False

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.escapes: list[str] = []
        self.written = False  # a parameter or a buffer was written to
        self.busy = False  # looking at tensors oneself is no escape
        self.dispatching = False  # what a function mode sees now comes from below Python: compiled code
        self._where = where
        self._operators: dict[Any, _Operator] = {}

    def of(self, tensor: Tensor) -> Origin:
        """The origin of a tensor; empty for one that came from outside (a constant that Python or numpy made)."""
        storages = _storages(tensor)
        return self._of(storages[0]) if len(storages) == 1 else _union(map(self._of, storages))

    def mark(self, tensor: Tensor, origin: Origin) -> None:
        """Add to the origin of a tensor's storage."""
        for storage in _storages(tensor):
            before = self._of(storage)
            if before is not origin and before is not _FROM_INPUT:
                merged = origin if before is _NOTHING else _union((before, origin))
                if merged is not _NOTHING:
                    setattr(storage, _ATTRIBUTE, (self, merged))

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Leave no mark on tensors that live on."""
        for storage in (storage for tensor in tensors for storage in _storages(tensor)):
            storage.__dict__.pop(_ATTRIBUTE, None)

    def mark_inputs(self, values: Iterable[Any]) -> None:
        """Say that the tensors in `values` are the network's input."""
        for tensor in tensors_in(values):
            self.mark(tensor, _FROM_INPUT)

    def leaves_for_python(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether `func` hands values over that no dispatcher sees; an escape, if those of `args` vary."""
        name = getattr(func, "__name__", "")
        if name in _COLLECT:
            read = [arg for arg in args if isinstance(arg, list | tuple)]
        elif name == "tensor_split":
            read = list(args[1:2])
        elif name in _TO_PYTHON:
            read = list(args[:1])
        else:
            return False
        if any(self.of(tensor).varies for tensor in tensors_in(read)):
            self._escape(name)
        return True

    def failed(self, func: Any, args: tuple[Any, ...]) -> None:
        """`func` raised: an escape, if values of `args` vary, as what is done about it may depend on them."""
        if any(self.of(tensor).varies for tensor in tensors_in(args)):
            self._escape(f"{getattr(func, '__name__', func)}, which failed")

    def _of(self, storage: Any) -> Origin:
        found = getattr(storage, _ATTRIBUTE, None)
        return found[1] if found is not None and found[0] is self else _NOTHING

    def _escape(self, what: str) -> None:
        self.escapes.append(f"{self._where()} ({'item' if what == '_local_scalar_dense' else what})")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.dispatching = True
        try:
            out = func(*args, **(kwargs or {}))
            self.busy = True
            self._record(func, args, kwargs or {}, out)
        finally:
            self.busy = self.dispatching = False
        return out

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = _operator(func)
        origin = self._given(args, kwargs) if operator.reads else _NOTHING
        made = [out] if isinstance(out, Tensor) else list(tensors_in((out,)))
        if origin is not _FROM_INPUT:
            if operator.draws(args, kwargs):
                origin = Origin(origin.sources | {RANDOM}, origin.operators)
            if operator.computes:
                origin = Origin(origin.sources, origin.operators | {operator.name})
        lost = (operator.selects and not _by_position(operator.name, args)) or not (made or operator.written)
        if lost and origin.varies and not operator.name.startswith(_NOT_READ):
            self._escape(operator.name)
        for index in operator.written:
            for tensor in tensors_in(args[index : index + 1]):
                before = self.of(tensor)
                self.written |= bool(before.sources) and not before.operators and not before.varies
                made.append(tensor)
        for tensor in made:
            self.mark(tensor, origin)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Origin:
        """The origin of all arguments; of an activation it is known at once."""
        found = _NOTHING
        for tensor in tensors_in((*args, kwargs) if kwargs else args):
            origin = self.of(tensor)
            if origin is _FROM_INPUT:
                return origin
            if origin is not found:
                found = Origin(found.sources | origin.sources, found.operators | origin.operators)
        return found


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def _by_position(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an index holds positions alone: what is selected by truth is as long as that has it."""
    return name == "index" and not any(i.dtype in (torch.bool, torch.uint8) for i in tensors_in(args[1:2]))


def _union(origins: Iterable[Origin]) -> Origin:
    sources: frozenset[str] = frozenset()
    operators: frozenset[str] = frozenset()
    for origin in origins:
        if INPUT in origin.sources:
            return _FROM_INPUT
        sources |= origin.sources
        operators |= origin.operators
    return Origin(sources, operators)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that `torch.vmap` and its like wrapped."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _storages(tensor: Tensor) -> list[Any]:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = unwrapped(tensor)
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        return [*_storages(tensor._indices()), *_storages(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
        return [storage for part in parts for storage in _storages(part)]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
        return [storage for part in parts for storage in _storages(part)]
    return [tensor.untyped_storage()]


def _operator(func: Any) -> _Operator:
    schema = getattr(func, "_schema", None)
    if schema is None:  # torch.cond and its like
        return _Operator(str(func), True, True, _never, False, ())
    name = schema.name.removeprefix("aten::")
    views = all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns) and bool(schema.returns)
    written = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    return _Operator(
        name,
        not (name.endswith("_like") or name.startswith("new_")),
        not views,
        _draws_of(schema) if torch.Tag.nondeterministic_seeded in func.tags else _never,
        torch.Tag.dynamic_output_shape in func.tags or name.lstrip("_").startswith("to_sparse"),
        written,
    )


def _never(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return False


def _draws_of(schema: Any) -> Callable[..., bool]:
    """Whether a call draws random numbers: dropout does not in eval mode, attention not without dropout."""
    places = {argument.name: index for index, argument in enumerate(schema.arguments)}
    defaults = {argument.name: argument.default_value for argument in schema.arguments}

    def draws(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        def value(name: str) -> Any:
            place = places[name]
            return args[place] if place < len(args) else kwargs.get(name, defaults[name])

        if "train" in places and not value("train"):
            return False
        return not ("dropout_p" in places and value("dropout_p") == 0)

    return cast(Callable[..., bool], draws)
