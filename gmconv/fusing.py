"""Modules that bring a method to merge their own branches: it is called, and its result measured.

RepVGG, MobileOne, FastViT, LeViT and others train with parallel branches and deploy with one convolution. Merging them
rounds, so unlike baking it is not bitwise: it is accepted by tolerance.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmconv.errors import SurgeryError, layer_words
from gmconv.outputs import output_tensors
from gmconv.surgery import copied

METHODS = ("switch_to_deploy", "reparameterize", "fuse")


class Fused(NamedTuple):
    """The network, and the modules whose own method merged their branches, by name."""

    model: nn.Module
    modules: tuple[str, ...]


def fuse_modules(model: nn.Module, *examples: Any, tolerance: float, live: nn.Module | None = None) -> Fused:
    """Call `switch_to_deploy`, `reparameterize` or `fuse` of every module that has one, in a copy of `model`.

    Args:
        model: in eval mode, baked or not.
        examples: the arguments of its forward that the result is measured on.
        tolerance: the largest error of an output, relative RMS.
        live: what `model` was before it was baked. A method that asks a layer for its mask or sigma fails where that
            layer is a plain convolution already; it is called there then, and what it leaves is to be baked again.

    Raises:
        SurgeryError: a module (named) whose method fails, or changes the network by more than `tolerance`.
    """
    before = _outputs(model, examples)
    try:
        return _measured(model, before, examples, tolerance)
    except SurgeryError:
        if live is None:
            raise
    return _measured(_with_modules_of(live, model), before, examples, tolerance)


def _with_modules_of(live: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of `model` in which the modules that merge their branches are those of `live`."""
    model, live = copied(model), copied(live)
    outer: list[str] = []
    for name in [name for name, module in live.named_modules() if _method(module)]:
        if not any(f"{name}.".startswith(f"{above}.") or not above for above in outer):
            outer.append(name)
    for name in outer:
        model = _set(model, name, live.get_submodule(name))
    return model


def _measured(model: nn.Module, before: list[Tensor], examples: tuple[Any, ...], tolerance: float) -> Fused:
    fused = _apply(copied(model))
    error = _error(before, _outputs(fused.model, examples)) if fused.modules else 0.0
    if error <= tolerance:
        return fused
    worst, culprit = 0.0, fused.modules[0]
    for name in fused.modules:  # each alone
        alone = _apply(copied(model), only=name)
        found = _error(before, _outputs(alone.model, examples)) if alone.modules else 0.0
        if found > worst:
            worst, culprit = found, name
        if found > tolerance:
            break
    module = model.get_submodule(culprit)
    raise SurgeryError(
        f"{layer_words(culprit)} ({type(module).__name__}): its {_method(module)}() changes the network's output by "
        f"{worst:.1e} of its RMS (together {error:.1e}, allowed {tolerance:.0e}): leave --fuse out"
    )


def _apply(model: nn.Module, only: str | None = None) -> Fused:
    """Outer modules first: what they merge is gone when its turn would come."""
    done: list[str] = []
    while True:
        names = [n for n, m in model.named_modules() if _method(m) and n not in done and only in (None, n)]
        if not names:
            model.eval()
            return Fused(model, tuple(done))
        name = names[0]
        done.append(name)
        module = model.get_submodule(name)
        method = _method(module)
        try:
            with torch.no_grad():
                made = getattr(module, str(method))()
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise SurgeryError(
                f"{layer_words(name)} ({type(module).__name__}): its {method}() fails ({reason})"
            ) from error
        if isinstance(made, nn.Module) and made is not module:
            model = _set(model, name, made)


def _set(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with `module` in the place of the one called `name`, which may be all of it."""
    parent, _, attribute = name.rpartition(".")
    if not name:
        return module
    setattr(model.get_submodule(parent), attribute, module)
    return model


def _method(module: nn.Module) -> str | None:
    """The first of METHODS that the module has and that needs no argument."""
    for name in METHODS:
        method = getattr(type(module), name, None)
        if method is None or not callable(method):
            continue
        parameters = list(inspect.signature(method).parameters.values())[1:]
        if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            return name
    return None


@torch.no_grad()
def _outputs(model: nn.Module, examples: tuple[Any, ...]) -> list[Tensor]:
    return [t.clone() for t in output_tensors(model(*examples))]


def _error(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative RMS error of an output; infinite where shapes differ or something is not finite."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return math.inf
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        difference = float((b.double() - a.double()).square().mean().sqrt())
        scale = float(a.double().square().mean().sqrt())
        error = difference / scale if scale else (0.0 if difference == 0 else math.inf)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
