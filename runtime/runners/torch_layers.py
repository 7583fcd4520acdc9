"""Time of each module of a network in PyTorch, by hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from runtime.runners.base import Array, LayerTime

if TYPE_CHECKING:
    from runtime.runners.torch import TorchRunner

_WARM_UP = 3


def module_times(runner: TorchRunner, feeds: Mapping[str, Array], runs: int) -> list[LayerTime]:
    """Time of each leaf module, ms; a module that is called several times in a run has the sum of its calls."""
    torch = runner._torch
    on_gpu = runner._device.type == "cuda"
    leaves = [(name, m) for name, m in runner.model.named_modules() if name and not any(m.children())]
    spent: dict[str, float] = {}
    started: dict[str, float] = {}

    def moment() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, moment())

    def after(name: str) -> Callable[..., None]:
        return lambda *_: spent.__setitem__(name, spent.get(name, 0.0) + 1000 * (moment() - started[name]))

    handles = [
        h for n, m in leaves for h in (m.register_forward_pre_hook(before(n)), m.register_forward_hook(after(n)))
    ]
    times: dict[str, list[float]] = {}
    try:
        tensor = runner._tensor(feeds)
        for run in range(runs + _WARM_UP):
            spent.clear()
            with runner._mode():
                runner.model(tensor)
            if run >= _WARM_UP:
                for name, value in spent.items():
                    times.setdefault(name, []).append(value)
    finally:
        for handle in handles:
            handle.remove()
    return [LayerTime(name, tuple(values)) for name, values in times.items()]
