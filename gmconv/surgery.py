"""Surgery on any `nn.Module`: `convert` puts Gaussian masks on its convolutions, `bake` takes them off again.

Both change the class of the layer object itself instead of replacing the object. So whatever points at a layer (its
parent, a second parent that shares it, hooks, a plain Python list) goes on pointing at the right one.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from gmconv.errors import BakeError, RefusedError, SurgeryError, layer_words, type_words
from gmconv.layer import GMConv2d, SigmaPer

M = TypeVar("M", bound=nn.Module)
Subclasses = Literal["refuse", "skip", "replace"]

_CONV_BEHAVIOUR = ("forward", "_conv_forward", "__call__", "_call_impl")
_GMCONV_BEHAVIOUR = (*_CONV_BEHAVIOUR, "mask", "baked_weight")
#: What is said of TorchScript.
SCRIPT = "is TorchScript, whose layers can be neither watched nor changed: start from the Python model"
#: Wrappers of torch and timm that hand on what they are given, and how each calls the network within.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_WRAPPERS |= dict.fromkeys(("AveragedModel", "ModelEmaV2", "ModelEmaV3"), "module")


def convert(
    model: M,
    sigma: float = 5.0,
    sigma_per: SigmaPer = "layer",
    where: Callable[[str, nn.Conv2d], bool] | None = None,
    *,
    subclasses: Subclasses = "refuse",
    inplace: bool = False,
) -> M:
    """Turn the `nn.Conv2d` layers of `model` into `GMConv2d`, keeping their weights.

    Args:
        model: any module, also a bare `nn.Conv2d`.
        sigma: initial sigma of every mask, in taps.
        sigma_per: "layer" or "channel".
        where: called with each convolution's name and module; decides which are masked. Default: all but 1x1 kernels
            (their mask is 1).
        subclasses: what to do with a subclass of `nn.Conv2d` that has a forward of its own: "refuse" (default),
            "skip" it, or "replace" its forward by GMConv2d's.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        The model, with hooks, sharing, train/eval state, device, dtype and memory format as they were.

    Raises:
        SurgeryError: a layer cannot be converted (named), or a weight is computed (weight norm, parametrization).
    """
    require_module(model, "convert")
    refuse_script(model)
    chosen: dict[str, nn.Conv2d] = {}
    for name, conv in _named_convs(model):
        wanted = where(name, conv) if where else tuple(conv.kernel_size) != (1, 1)
        if isinstance(conv, GMConv2d) or not wanted:
            continue
        if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
            raise SurgeryError(f"{layer_words(name)} is lazy and has no weight yet: run the model once, then convert")
        if _changes(conv, nn.Conv2d, _CONV_BEHAVIOUR):
            if subclasses == "skip":
                continue
            if subclasses == "refuse":
                raise SurgeryError(
                    f"{layer_words(name)} is {type_words(conv)}, a Conv2d with a forward of its own that a mask "
                    f"would replace: pass where= to leave it out, or subclasses='skip' or 'replace'"
                )
        _require_plain_weight(name, conv, SurgeryError)
        chosen[name] = conv
    if not inplace:
        model = copied(model)
        copies = dict(model.named_modules(remove_duplicate=False))
        chosen = {name: cast(nn.Conv2d, copies[name]) for name in chosen}
    for conv in chosen.values():
        conv.__dict__.pop("forward", None)
        conv.__class__ = GMConv2d
        cast(GMConv2d, conv).add_sigma(sigma, sigma_per)
    return model


def bake(model: M, inplace: bool = False, *, others: Literal["refuse", "leave"] = "refuse") -> M:
    """Turn every `GMConv2d` into an `nn.Conv2d` whose weight is, bit for bit, the product the live layer uses.

    Args:
        model: any module; layers that are not GMConv2d are left alone.
        inplace: change `model` itself instead of a deep copy.
        others: what to do with masked layers of another make: "refuse" them, or "leave" them to `bake_constants`.

    Returns:
        The model without masks: no GMConv2d in its tree, no sigma in its state_dict, shared modules still shared.

    Raises:
        BakeError: a layer (named) whose mask depends on the input, whose class changes how it computes, whose weight
            is computed, or whose weight or sigma holds NaN or Inf.
    """
    require_module(model, "bake")
    for name, module in model.named_modules():
        if others == "refuse" or has_static_mask(module):
            _require_bakeable(name, module)
    if others == "refuse" and not masked_layers(model):
        warnings.warn(
            "nothing was baked: no layer is a gmconv.GMConv2d; gmconv.bake_constants(model, *examples) finds the "
            "computed kernels of layers of any class",
            stacklevel=2,
        )
    if not inplace:
        model = copied(model)
    products: dict[tuple[int, int], nn.Parameter] = {}  # layers that share weight and sigma go on sharing the product
    originals: list[Tensor] = []  # keeps the ids above from being reused
    for module in list(model.modules()):
        if isinstance(module, GMConv2d) and (others == "refuse" or has_static_mask(module)):
            weight, sigma = module.weight, module.sigma
            originals += [weight, sigma]
            key = (id(weight), id(sigma))
            if key not in products:
                with torch.no_grad():
                    products[key] = nn.Parameter(module.baked_weight(), requires_grad=weight.requires_grad)
            module.weight = products[key]
            del module.sigma, module.sigma_per
            cast(nn.Module, module).__class__ = nn.Conv2d
    return model


def require_module(model: object, function: str) -> None:
    """Raise TypeError where what `function` was given is no network."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type_words(model)
        raise TypeError(
            f"{function} takes the network itself, a torch.nn.Module, and got {given}; "
            f"gmconv.load_checkpoint(FILE, arch=...).model is the one in a file"
        )


def refuse_script(model: nn.Module, error: type[SurgeryError] = SurgeryError) -> None:
    """Raise `error` where the network or a part of it (named) is TorchScript, traced or scripted."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise error(f"{layer_words(name)} {SCRIPT}")


def refuse_valueless(model: nn.Module) -> None:
    """Raise RefusedError where a parameter or a buffer (named) is lazy or on the meta device."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise RefusedError(f"{name!r} is lazy and has no values yet: run the network once, and load its weights")
        if tensor.is_meta:
            raise RefusedError(f"{name!r} is on the meta device and has no values: load the network's weights first")


def network_within(model: nn.Module) -> nn.Module:
    """The network in the wrappers of `torch.compile`, data parallelism and weight averaging, nested or none."""
    kind = type(model)
    name = _WRAPPERS.get(kind.__name__) if kind.__module__.startswith(("torch.", "timm.")) else None
    inner = model._modules.get(name) if name else None
    return model if inner is None else network_within(inner)


def copied(model: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy, also of a network that keeps tensors with a history (the kernel of its last forward, say).

    `copy.deepcopy` refuses those; here they are copied without it. `memo` takes the copy of each object by id.

    Raises SurgeryError where the network, or a part of it, cannot be copied.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in tree_leaves(module.__dict__):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # a lock, a handle
        raise SurgeryError(
            f"the network cannot be copied ({' '.join(str(error).split())[:200]}), and this would change it: give one "
            f"that copy.deepcopy takes"
        ) from error
    own = set(model.modules())
    if shared := [name for name, module in made.named_modules() if module in own]:
        raise SurgeryError(
            f"{layer_words(shared[0])} is its own copy (its __deepcopy__?), and this would change it: give one that "
            f"copy.deepcopy copies"
        )
    for module in made.modules():  # model.forward = torch.compile(model.forward) would go on running the original
        forward = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
        if inspect.ismethod(forward) and forward.__func__ is type(module).forward:
            del vars(module)["forward"]
    return made


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block, in its own mode again after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def has_static_mask(module: nn.Module) -> bool:
    """Whether the module computes its kernel as GMConv2d does, and no other way."""
    known = isinstance(module, GMConv2d) and not _changes(module, GMConv2d, _GMCONV_BEHAVIOUR)
    return known and module._parameters.get("weight") is not None


def masked_layers(model: nn.Module) -> dict[str, GMConv2d]:
    """The GMConv2d layers by name, in registration order; a layer shared between places has its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GMConv2d)}


def _named_convs(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            yield name, module


def _changes(module: nn.Module, base: type[nn.Module], behaviour: tuple[str, ...]) -> bool:
    """Whether the module's class or the instance itself overrides how `base` computes."""
    cls: Any = type(module)
    return any(m in module.__dict__ or getattr(cls, m, None) is not getattr(base, m, None) for m in behaviour)


def _require_plain_weight(name: str, conv: nn.Conv2d, error: type[SurgeryError]) -> None:
    if conv._parameters.get("weight") is None:
        raise error(
            f"{layer_words(name)} computes its weight (weight norm, spectral norm, pruning or another "
            f"parametrization): make it permanent first, e.g. torch.nn.utils.parametrize.remove_parametrizations"
        )


def _require_bakeable(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule) and (not name or "sigma" in dict(module.named_parameters())):
        raise BakeError(f"{layer_words(name)} {SCRIPT}")
    if not isinstance(module, GMConv2d):
        if "sigma" in module._parameters and (isinstance(module, nn.Conv2d) or "gm" in type(module).__name__.lower()):
            raise BakeError(
                f"{layer_words(name)} is {type_words(module)} with a sigma, but not a gmconv.GMConv2d: its mask "
                f"is unknown here; gmconv.bake_constants(model, *examples) and gmconv.deploy(model, examples) bake "
                f"layers of any class by watching them run"
            )
        return
    _require_plain_weight(name, module, BakeError)
    if _changes(module, GMConv2d, _GMCONV_BEHAVIOUR):
        raise BakeError(
            f"{layer_words(name)} is {type_words(module)}, which computes its mask or output in its own way "
            f"(perhaps from the input); gmconv.bake_constants(model, *examples) watches it run and bakes it if it "
            f"is constant"
        )
    for part in ("sigma", "weight"):
        if getattr(module, part).is_meta:
            raise BakeError(f"{layer_words(name)}: its {part} is on the meta device and has no values")
        if not torch.isfinite(getattr(module, part)).all():
            raise BakeError(f"{layer_words(name)}: its {part} holds NaN or Inf; this checkpoint cannot be deployed")
