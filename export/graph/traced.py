"""What torch.export does not bear in somebody else's network, put right for as long as it is traced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_OWN = ("_parameters", "_buffers", "_modules")


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """What a forward keeps in its modules is put back when it is over: of a traced one, tensors without values.

    torch.export refuses a network that holds such.
    """
    before: list[tuple[nn.Module, dict[str, Any]]] = []

    def note(*_: object) -> None:
        before[:] = [(m, {k: copy.copy(v) if k in _OWN else v for k, v in m.__dict__.items()}) for m in model.modules()]

    def restore(*_: object) -> None:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)

    hooks = model.register_forward_pre_hook(note), model.register_forward_hook(restore, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def reserved_renamed(model: nn.Module) -> Iterator[None]:
    """A child with a name that torch.fx keeps for itself (`meta`, `graph`, `code`) is called `meta_`, ... meanwhile."""
    from torch import fx

    taken = [name for name in model._modules if name == "meta" or hasattr(fx.GraphModule, name)]
    order = list(model._modules)
    for name in taken:
        model.__dict__[name] = model._modules[name]  # its forward goes on finding it
    model._modules.update({f"{name}_": model._modules.pop(name) for name in taken})
    try:
        yield
    finally:
        for name in taken:
            del model.__dict__[name]
            model._modules[name] = model._modules.pop(f"{name}_")
        model._modules.update({name: model._modules.pop(name) for name in order})
