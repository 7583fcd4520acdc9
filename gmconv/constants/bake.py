"""`bake_constants`: whatever kernel does not depend on the network's input becomes a stored one."""

from __future__ import annotations

import copy
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gmconv.constants.certificate import certify, kept_certificate
from gmconv.constants.observe import Use, Watched, watch
from gmconv.constants.origins import INPUT, RANDOM
from gmconv.constants.rewrite import become, plain_layer, redirect
from gmconv.errors import BakeError, layer_words
from gmconv.records import KernelCertificate
from gmconv.surgery import copied, refuse_script, require_module

Dynamic = Literal["refuse", "keep"]


class Baked(NamedTuple):
    """What `bake_constants` returns: the network, and a certificate of each kernel that was computed."""

    model: nn.Module
    certificates: tuple[KernelCertificate, ...]


@dataclass
class _Layer:
    """A module with computed kernels: its calls in the runs, side by side, and why they cannot be stored."""

    module: nn.Module
    name: str
    calls: list[tuple[Use, ...]]
    why: str | None

    @property
    def whole(self) -> bool:
        """Whether the module is one call and nothing else, always the same."""
        uses = [call[0] for call in self.calls]
        same = {(u.digest, u.layer, str(u.settings), u.pads, id(u.bias) if u.bias is not None else 0) for u in uses}
        # Padding with zeros may follow the input's size: such a module keeps its forward.
        fits = all(u.whole and not u.bias_varies and (u.pads is None or u.pads[1] != "constant") for u in uses)
        return fits and len(same) == 1

    @property
    def changes(self) -> bool:
        """Whether its forward runs several times in one of the network's, each time with another kernel."""
        digests: dict[int, str] = {}
        return any(digests.setdefault(call[0].index, call[0].digest) != call[0].digest for call in self.calls)


def bake_constants(
    model: nn.Module,
    *examples: Any,
    dynamic: Dynamic = "refuse",
    sizes: Sequence[tuple[Any, ...]] = (),
    fixed_batch: bool = False,
    inplace: bool = False,
) -> Baked:
    """Turn every layer whose kernel is computed, but not from the input, into a plain layer that stores the kernel.

    The network is run twice, on `examples` and on other values and another batch size. A kernel is constant if nothing
    that it was computed from varies (see `gmconv.constants.origins`) and every run gave the same bits. A module that
    is one call of a convolution or linear operator becomes the plain layer: same object, same name. Any other keeps
    its forward, and the call is made by a child layer of it (`baked_0`, ...). In both cases outputs are bitwise those
    of the live network, which is verified by running it again.

    Where neither does (a layer that runs with several kernels, one that its parent writes into), the children are the
    network's own.

    Args:
        model: any module in eval mode. Running it leaves in it what its forward leaves in it.
        examples: the arguments of its forward: tensors, also nested.
        dynamic: "refuse" a layer whose kernel depends on the input or on chance, or "keep" it as it is.
        sizes: further arguments to run it on, where other batch or input sizes are to give the same kernels.
        fixed_batch: the network is for the examples' batch size alone, which a kernel may follow then.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        The network and the certificates; a network without computed kernels comes back as it was.

    Raises:
        BakeError: a layer (named) whose kernel is not shown to be constant; training mode; a ScriptModule; a thread.
    """
    _require_watchable(model)
    runs, seen = _watch_twice(model, examples, sizes, fixed_batch=fixed_batch)
    layers = _computed_layers(seen, [_shapes(run) for run in runs])
    kept = [layer for layer in layers if layer.why is not None]
    if kept and dynamic == "refuse":
        first = kept[0]
        advice = "" if first.why == _NOT_FINITE else "; --keep-dynamic leaves it as it is"
        raise BakeError(f"{layer_words(first.name)} ({type(first.module).__name__}): {first.why}{advice}")
    found = [layer for layer in layers if layer.why is None]
    certificates = [kept_certificate(layer.name, layer.why or "") for layer in kept]
    if not found:
        return Baked(model if inplace else copied(model), tuple(certificates))
    raw = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for module, name in seen.strangers.items():
        raw |= {f"{name}.{key}": tensor.detach() for key, tensor in module.named_parameters()}
    made = [[certify(call[0], raw) for call in layer.calls] for layer in found]
    del raw
    baked, names = _rewritten(model, found, kept, runs, seen, inplace)
    for layer_names, layer_certificates in zip(names, made, strict=True):
        unique = dict(zip(layer_names, layer_certificates, strict=True))
        certificates += [certificate.named(name) for name, certificate in unique.items()]
    return Baked(baked, tuple(certificates))


def _require_watchable(model: nn.Module) -> None:
    require_module(model, "bake_constants")
    if model.training:
        raise BakeError("the network is in training mode, where kernels may change from call to call: model.eval()")
    refuse_script(model, BakeError)


def _watch_twice(
    model: nn.Module, examples: tuple[Any, ...], sizes: Sequence[tuple[Any, ...]], *, fixed_batch: bool
) -> tuple[list[tuple[Any, ...]], Watched]:
    """The runs that were watched, and what they showed; of other batches only where a kernel is computed."""
    failed: Exception | None = None
    own = [size for size in sizes if _batches(size) == _batches(examples)]
    sides = [size for size in sizes if _rows(size) != _rows(examples)]
    batches = [size for size in sizes if _rows(size) == _rows(examples)]
    tries = [] if fixed_batch else [([_larger(examples), *sides], batches)]
    for others, more in (*tries, ([_noise(examples), *own], []), ([_shuffled(examples), *own], [])):
        runs = [examples, *others]
        try:
            return [*runs, *more], watch(model, runs, more)
        except BakeError:
            raise
        except Exception as error:  # a network that takes one batch size, or only some values
            failed = failed or error
            if "torch._dynamo" in sys.modules:  # torch.cond leaves it broken
                torch._dynamo.reset()
    assert failed is not None
    reason = next(iter(str(failed).splitlines()), type(failed).__name__)
    raise BakeError(f"the network does not run on its example inputs while its kernels are watched ({reason})")


def _larger(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other values, and one sample more."""
    return _mapped(args, lambda t: torch.cat([t, t[:1]]) if t.dim() and len(t) else t, noise=True)


def _noise(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _mapped(args, lambda t: t, noise=True)


def _shuffled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _mapped(args, lambda t: t, noise=False)


def _mapped(args: tuple[Any, ...], resize: Callable[[Tensor], Tensor], *, noise: bool) -> tuple[Any, ...]:
    """Noise far from what a network is used to, for floats; else the values that there are, in another order."""
    generator = torch.Generator().manual_seed(1)

    def other(tensor: Tensor) -> Tensor:
        tensor = resize(tensor.detach())
        if noise and tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator) * 7 + 3
            return drawn.to(device=tensor.device, dtype=tensor.dtype)
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.reshape(-1)[order].view(tensor.shape)

    return cast(tuple[Any, ...], tree_map_only(Tensor, other, args))


def _shapes(args: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


def _rows(args: tuple[Any, ...]) -> list[tuple[int, ...]]:
    return [shape[1:] for shape in _shapes(args)]


def _batches(args: tuple[Any, ...]) -> list[int]:
    return [shape[0] for shape in _shapes(args) if shape]


def _computed_layers(seen: Watched, shapes: Sequence[tuple[tuple[int, ...], ...]]) -> list[_Layer]:
    """The modules with computed kernels that the input passes through, in the order in which they first ran."""
    computed = [[use for use in run if use.computed] for run in seen.uses]
    if not any(computed):
        return []
    same = len({tuple((u.name, u.index, u.layer) for u in run) for run in computed}) == 1
    by_module: dict[nn.Module, list[tuple[Use, ...]]] = defaultdict(list)
    if same:
        for uses in zip(*computed, strict=True):
            by_module[uses[0].module].append(uses)
    else:
        for use in (use for run in computed for use in run):
            by_module[use.module].append((use,))
    found = []
    for module, calls in by_module.items():
        layer = _Layer(module, calls[0][0].name, calls, None)
        layer.why = _why_not(layer, seen, shapes) or (None if same else "from run to run other layers ran")
        found.append(layer)
    return found


_NOT_FINITE = "its kernel holds NaN or Inf: the training diverged or the checkpoint is damaged"


#: Why two runs gave two kernels, by what of their inputs differs most.
_FOLLOWS = {
    "values": "two inputs gave two kernels, in a way that no operator shows",
    "batch": "two batches gave two kernels: one that follows the batch's size is exported with --batch N",
    "size": "its kernel follows the input's height and width: export it for one size, without --dynamic-hw",
}


def _why_not(layer: _Layer, seen: Watched, shapes: Sequence[tuple[tuple[int, ...], ...]]) -> str | None:
    """Why the layer's kernels cannot be stored, in words; None if they can. `shapes`: of the inputs, run by run."""
    uses = [use for call in layer.calls for use in call]
    sources = frozenset[str]().union(*(use.origin.sources for use in uses))
    if INPUT in sources:
        return "its kernel is computed from the network's input"
    if RANDOM in sources:
        return "its kernel is random"
    if seen.escapes:
        return (
            f"values of the input reach Python in {seen.escapes[0]}, where they may decide about its kernel "
            f"(torch.where makes such a choice in the graph)"
        )
    if not all(bool(torch.isfinite(use.kernel).all()) for use in uses if use.kernel is not None):
        return _NOT_FINITE
    for call in layer.calls:
        found = [(use.digest, str(use.settings)) for use in call]
        for run, other in enumerate(found):
            if other != found[0]:
                sized = [shape[1:] for shape in shapes[run]] != [shape[1:] for shape in shapes[0]]
                return _FOLLOWS["size" if sized else "batch" if shapes[run] != shapes[0] else "values"]
    if any(use.hidden for use in uses):
        return "its kernel is used by compiled code (TorchScript), where no stored one can be put"
    if any(use.bias_varies and "Transpose" in use.layer.__name__ for use in uses):
        return "its bias is computed from the network's input"
    return None


def _rewritten(
    model: nn.Module,
    layers: list[_Layer],
    kept: list[_Layer],
    runs: list[tuple[Any, ...]],
    seen: Watched,
    inplace: bool,
) -> tuple[nn.Module, list[list[str]]]:
    """The network with stored kernels, and the name of the layer that makes each call, per layer and call."""
    memo: dict[int, Any] = {}
    target = model if inplace else copied(model, memo)
    modules = [memo.get(id(layer.module), layer.module) for layer in layers]
    problem = ""
    for frozen, way in sorted(itertools.product({seen.writes, False}, _WAYS), key=lambda each: not each[0]):
        undo = _Undo([target, *modules])
        try:
            names = _rewrite(layers, modules, target, seen, way, frozen=frozen)
            problem = _difference(watch(target, runs), seen, {layer.name for layer in kept})
        except Exception as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not problem:
            return target, names
        undo()
    raise BakeError(
        f"layers {', '.join(repr(layer.name) for layer in layers[:3])}: stored kernels do not do: {problem}"
    )


_WAYS = ("whole", "inside", "root")


class _Plain:
    """Plain layers that make the calls; those with one kernel share it."""

    def __init__(self) -> None:
        self._shared: dict[tuple[str, frozenset[str]], nn.Parameter] = {}

    def __call__(self, use: Use) -> nn.Module:
        key = (use.digest, use.origin.sources)
        if key not in self._shared:
            self._shared[key] = nn.Parameter(cast(Tensor, use.kernel), requires_grad=False)
        return plain_layer(use, self._shared[key])


def _rewrite(
    layers: list[_Layer], modules: list[nn.Module], model: nn.Module, seen: Watched, way: str, *, frozen: bool
) -> list[list[str]]:
    """Each module becomes the plain layer; one that is more than a call, or "inside", keeps its forward.

    Calls whose kernel changes, calls of modules outside of the module tree, which may not be this network's alone, and
    all calls by the "root", are made by children of the network. Those are counted over the whole network, so every
    module goes on making as many calls as before, and asking as many tensors for their values.
    """
    plain, hosted = _Plain(), dict[int, Use]()
    names: list[list[str]] = []
    elsewhere = [way == "root" or layer.changes or layer.module in seen.strangers for layer in layers]
    for layer, module, away in zip(layers, modules, elsewhere, strict=True):
        uses = [call[0] for call in layer.calls]
        counts = any(elsewhere) and (any(use.index for use in uses) or layer.module in seen.values)
        if way == "whole" and layer.whole and not away and not counts:
            become(module, plain(uses[0]))
            names.append([layer.name] * len(uses))
            continue
        for use in uses:
            use.pads = None  # the module's forward goes on padding
        if away:
            hosted |= {use.place: use for use in uses}
            names.append([])
            continue
        children = redirect(module, {use.index: plain(use) for use in uses}, seen.values.get(layer.module, []))
        names.append([f"{layer.name}.{children[use.index]}".lstrip(".") for use in uses])
    if not hosted and not frozen:
        return names
    stems = {place: f"{use.name.replace('.', '_')}_baked".lstrip("_") for place, use in hosted.items()}
    values = seen.values.get(seen.model, []) if hosted else []
    children = redirect(model, {p: plain(use) for p, use in hosted.items()}, values, stems, frozen=frozen)
    return [
        found or [children[call[0].place] for call in layer.calls] for found, layer in zip(names, layers, strict=True)
    ]


class _Undo:
    """Puts modules back as they were."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self._kept = [
            (m, type(m), {k: copy.copy(v) if isinstance(v, dict) else v for k, v in m.__dict__.items()})
            for m in modules
        ]

    def __call__(self) -> None:
        for module, cls, attributes in self._kept:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _difference(again: Watched, seen: Watched, kept: set[str]) -> str:
    """What is wrong with the rewritten network; empty if it is the live one, bit for bit, and computes no kernel."""
    left = sorted({use.name for run in again.uses for use in run if use.computed} - kept)
    if left:
        return f"the kernel of {left[0]!r} is still computed"
    for before, after in zip(seen.outputs, again.outputs, strict=True):
        if len(before) != len(after) or not all(map(_same_bits, before, after)):
            return "" if kept else "the network's output is another"
    return ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
