"""Running a network while watching which kernel each convolution and linear operator receives, and from where."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gmconv.certificate import tensor_sha256
from gmconv.constants.operators import Call, Product, kernel_call, product_operands
from gmconv.constants.origins import INPUT, Origin, Origins, unwrapped
from gmconv.eager import as_written
from gmconv.errors import BakeError, layer_words, type_words
from gmconv.outputs import output_tensors

#: What `tensor.data = other` calls.
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
#: Methods of a tensor that give Python its values.
VALUES = frozenset({"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__", "__index__"})


@dataclass
class Use:
    """One call in a run: by which module, with which kernel, made from what.

    `index` counts the operators that ran inside the module's forward, those of its children included, `place` those
    of the whole network. `stored`: the kernel is a parameter or buffer as it stands; any other has its sha256 in
    `digest` and, unless it varies, a copy in `kernel`. `fed`: the input reaches the call. `pads`: an `F.pad` between
    the module's input and the operator's. `whole`: the module is this one call and nothing else. `hidden`: the call
    came from code below Python.
    """

    name: str
    module: nn.Module
    index: int
    place: int
    layer: type[nn.Module]
    settings: dict[str, Any]
    bias: Tensor | None
    bias_varies: bool
    kernel: Tensor | None
    stored: bool
    digest: str
    origin: Origin
    fed: bool
    pads: tuple[tuple[int, ...], str] | None
    whole: bool
    hidden: bool

    @property
    def computed(self) -> bool:
        """Whether the input passes through a kernel that is not simply a stored tensor."""
        return self.fed and not self.stored


@dataclass
class Watched:
    """What runs of `model` showed: per run its uses and its outputs; where values that vary reached Python.

    `values`: what tensors gave Python inside each module's forward, its children's included, in order. `strangers`:
    modules that ran and are none of the network's, by the name that they go by here; `writes`: something was written
    into a parameter or a buffer.
    """

    model: nn.Module
    uses: list[list[Use]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    values: dict[nn.Module, list[Any]] = field(default_factory=dict)
    escapes: list[str] = field(default_factory=list)
    strangers: dict[nn.Module, str] = field(default_factory=dict)
    writes: bool = False

    @property
    def computes(self) -> bool:
        """Whether any run computed a kernel."""
        return any(use.computed for run in self.uses for use in run)


class _Frame:
    """One call of a module's forward."""

    def __init__(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.name, self.module, self.args = name, module, args
        self.count = 0
        self.values: list[Any] = []
        self.calls: list[tuple[Use, Any]] = []
        self.padded: dict[int, tuple[Tensor, Tensor, tuple[int, ...], str]] = {}


class _Kernels(TorchFunctionMode):
    """Notes every call of a kernel operator under the module whose forward makes it."""

    def __init__(self, model: nn.Module, watched: Watched) -> None:
        super().__init__()
        self.watched = watched
        self.names = {module: name for name, module in model.named_modules()}
        self.frames = [_Frame("", model, ())]
        self.origins = Origins(lambda: self.where)
        self.places: set[tuple[Any, ...]] = set()
        self.tensors: list[Tensor] = []
        self.plain: set[Any] = set()  # functions that are of no interest
        self._store([*model.named_parameters(), *model.named_buffers()])
        self.thread = threading.get_ident()

    def _store(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.origins.mark(tensor, Origin(frozenset([name])))
            self.places.add(_place(tensor))
            self.tensors.append(tensor)

    @property
    def where(self) -> str:
        """The layer that runs."""
        return layer_words(self.frames[-1].name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.origins.busy or func in self.plain:
            return self._called(func, args, kwargs or {})
        if func == SET_DATA:
            self.watched.writes = True
        leaves = self.origins.leaves_for_python(func, (*args, *(kwargs or {}).values()))
        out = self._called(func, args, kwargs or {})
        if func is F.pad:
            self._note_padding(out, *args, **(kwargs or {}))
        elif (call := kernel_call(func, args, kwargs)) is not None:
            self._note(call, out)
        elif (operands := product_operands(func, args, kwargs)) is not None:
            self._note_product(operands, out)
        elif getattr(func, "__name__", "") in VALUES:
            for outer in self.frames:
                outer.values.append(copy.copy(out))
        elif not leaves:
            self.plain.add(func)
        return out

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except Exception:
            self.origins.failed(func, (*args, *kwargs.values()))
            raise

    def _note_padding(self, out: Tensor, input: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> None:
        if not value:
            self.frames[-1].padded[id(out)] = (out, input, tuple(pad), mode)

    def _note(self, call: Call, out: Any) -> None:
        frame = self.frames[-1]
        if _computes(kind := type(call.kernel)):
            raise BakeError(
                f"{layer_words(frame.name)} ({type(frame.module).__name__}): its kernel is a {kind.__name__}, a "
                f"class of tensors that computes by itself, where nothing can be watched; do that in the layer's "
                f"forward"
            )
        given = frame.args[0] if frame.args else None
        x, pads = call.input, None
        if id(x) in frame.padded and frame.padded[id(x)][1] is given:
            _, x, added, mode = frame.padded[id(x)]
            pads = (added, mode)
        origin = self.origins.of(call.kernel)
        stored = bool(origin.sources) and not origin.operators and not origin.varies
        stored = stored and (call.layer is nn.Linear or _place(call.kernel) in self.places)
        fed = INPUT in self.origins.of(call.input).sources or bool(self.origins.escapes)
        keep = stored or (fed and not origin.varies and len(self.watched.uses) == 1)
        bias = Origin() if call.bias is None else self.origins.of(call.bias)
        use = Use(
            name=frame.name,
            module=frame.module,
            index=frame.count,
            place=self.frames[0].count,
            layer=call.layer,
            settings=call.settings,
            bias=call.bias if call.bias is None or isinstance(call.bias, nn.Parameter) else call.bias.detach().clone(),
            bias_varies=bias.varies,
            kernel=None if not keep else call.kernel if stored else unwrapped(call.kernel).detach().clone(),
            stored=stored,
            digest=_digest(call.kernel) if fed and not stored else "",
            origin=origin,
            fed=fed,
            pads=pads,
            whole=given is not None and x is given,
            hidden=self.origins.dispatching,
        )
        if not use.hidden:
            for outer in self.frames:
                outer.count += 1
        frame.calls.append((use, out))
        self.watched.uses[-1].append(use)

    def _note_product(self, operands: list[Tensor], out: Any) -> None:
        """A product of the input with what was computed from no input; any other is counted alone."""
        if self.origins.dispatching:
            return
        frame, found = self.frames[-1], [self.origins.of(operand) for operand in operands]
        fed = any(INPUT in origin.sources for origin in found)
        for place, (kernel, origin) in enumerate(zip(operands, found, strict=True)):
            if fed and origin.operators and not origin.varies and unwrapped(kernel) is kernel:
                use = Use(
                    name=frame.name,
                    module=frame.module,
                    index=frame.count,
                    place=self.frames[0].count,
                    layer=Product,
                    settings={"place": place},
                    bias=None,
                    bias_varies=False,
                    kernel=kernel.detach().clone() if len(self.watched.uses) == 1 else None,
                    stored=False,
                    digest=_digest(kernel),
                    origin=origin,
                    fed=True,
                    pads=None,
                    whole=False,
                    hidden=False,
                )
                frame.calls.append((use, None))
                self.watched.uses[-1].append(use)
                break
        for outer in self.frames:
            outer.count += 1

    def enter(self, module: nn.Module, args: Any) -> None:
        """A global hook: a module's forward begins."""
        if threading.get_ident() != self.thread:
            raise BakeError(_THREAD.format(type_words(module)))
        if module not in self.names:  # in a plain list, which the module tree does not show
            self.origins.busy = True
            kind = type(module).__name__
            taken = sum(type(other) is type(module) for other in self.watched.strangers)
            name = self.names[module] = self.watched.strangers[module] = f"{kind}_{taken}" if taken else kind
            own = (*module._parameters.items(), *module._buffers.items())
            self._store((f"{name}.{key}", tensor) for key, tensor in own if tensor is not None)
            self.origins.busy = False
        self.frames.append(_Frame(self.names[module], module, args))

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """A global hook: a module's forward is over."""
        frame = self.frames.pop()
        if frame.values:
            self.watched.values.setdefault(module, frame.values)
        for use, made in frame.calls:
            use.whole &= len(frame.calls) == 1 and made is out


_THREAD = "{} runs in a thread of its own, where its kernels cannot be watched: run it in the thread that calls forward"


@torch.no_grad()
def watch(model: nn.Module, runs: Sequence[tuple[Any, ...]], more: Sequence[tuple[Any, ...]] = ()) -> Watched:
    """Run the network on each of `runs`, one after the other: what the first leaves behind, the second shows.

    On `more` too, if it has computed a kernel by then.

    The arguments are copied first, as a forward may write to them. Random numbers are the same in every watch, and
    others in each run.

    Raises:
        BakeError: the network starts a thread.
    """
    watched = Watched(model)
    kernels = _Kernels(model, watched)
    watched.escapes = kernels.origins.escapes
    hooks = nn.modules.module
    with ExitStack() as stack:
        stack.callback(lambda: kernels.origins.forget(kernels.tensors))
        stack.callback(hooks.register_module_forward_pre_hook(kernels.enter).remove)
        stack.callback(hooks.register_module_forward_hook(kernels.leave).remove)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(as_written())
        stack.enter_context(_threads_refused(kernels))
        stack.enter_context(kernels)
        stack.enter_context(kernels.origins)
        for seed, args in enumerate([*runs, *more]):
            if seed == len(runs) and not watched.computes:
                break
            kernels.origins.busy = True
            copied = tree_map_only(Tensor, lambda t: t.detach().clone(), args)
            kernels.origins.mark_inputs(tree_leaves(copied))
            torch.manual_seed(seed)
            kernels.origins.busy = False
            watched.uses.append([])
            kernels.frames[0].count = 0
            out = model(*copied)
            kernels.origins.busy = True
            watched.writes |= kernels.origins.written
            watched.outputs.append([t.detach().clone() for t in output_tensors(out)])
            kernels.origins.busy = False
    _pass_over_products(watched)
    return watched


def _pass_over_products(watched: Watched) -> None:
    """Of products keep those that every run made alike: attention multiplies what follows the batch or the input."""
    runs = [{u.place: u for u in run if u.layer is Product} for run in watched.uses]
    for run, products in zip(watched.uses, runs, strict=True):
        kept = {
            place
            for place, use in products.items()
            if not watched.escapes
            and all(place in other and other[place].digest == use.digest for other in runs)
            and bool(torch.isfinite(runs[0][place].kernel).all())  # type: ignore[arg-type]
        }
        run[:] = [use for use in run if use.layer is not Product or use.place in kept]


@contextmanager
def _threads_refused(kernels: _Kernels) -> Iterator[None]:
    """While the network runs, giving work to another thread is an error: what runs there cannot be watched."""

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == kernels.thread:
                raise BakeError(_THREAD.format(kernels.where))
            return original(*args, **kwargs)

        return refuse

    with (
        mock.patch.object(threading.Thread, "start", refusing(threading.Thread.start)),
        mock.patch.object(ThreadPoolExecutor, "submit", refusing(ThreadPoolExecutor.submit)),
    ):
        yield


def _computes(kind: type[Tensor]) -> bool:
    """Whether a class of tensors decides itself what an operator does with them."""
    own = kind.__mro__[: kind.__mro__.index(Tensor)]
    return any({"__torch_function__", "__torch_dispatch__"} & vars(c).keys() for c in own if c is not nn.Parameter)


def _digest(tensor: Tensor) -> str:
    tensor = unwrapped(tensor)
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor_sha256(tensor)}"


def _place(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided or unwrapped(tensor) is not tensor:
        return (id(tensor),)
    storage = tensor.untyped_storage()
    return (storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
