"""The modules of a network in PyTorch: which have weights, and the time of each, by hooks.

On a GPU it is told by CUDA events, as every other timing there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from runtime.runners.base import PROFILE_WARM_UP, Array, LayerTime
from runtime.runners.torch_network import TorchNetwork


def module_times(network: TorchNetwork, feeds: Mapping[str, Array], runs: int) -> list[LayerTime]:
    """Time of each leaf module, ms; a module that is called several times in a run has the sum of its calls."""
    on_gpu = network.place.type == "cuda"
    leaves = [(name, m) for name, m in network.model.named_modules() if name and not any(m.children())]
    calls: list[tuple[str, Any, Any]] = []  # a module's name, the moments before and after one call
    started: dict[str, Any] = {}

    def moment() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = network.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def before(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, moment())

    def after(name: str) -> Callable[..., None]:
        return lambda *_: calls.append((name, started[name], moment()))

    handles = [
        h for n, m in leaves for h in (m.register_forward_pre_hook(before(n)), m.register_forward_hook(after(n)))
    ]
    times: dict[str, list[float]] = {}
    try:
        tensors = network.tensors(feeds)
        for run in range(runs + PROFILE_WARM_UP):
            calls.clear()
            with network.mode():
                network.model(*tensors)
                if on_gpu:
                    network.torch.cuda.synchronize(network.place)
            spent: dict[str, float] = {}
            for name, start, end in calls:
                ms = start.elapsed_time(end) if on_gpu else 1000 * (end - start)
                spent[name] = spent.get(name, 0.0) + ms
            if run >= PROFILE_WARM_UP:
                for name, value in spent.items():
                    times.setdefault(name, []).append(value)
    finally:
        for handle in handles:
            handle.remove()
    return [LayerTime(name, tuple(values)) for name, values in times.items()]


def weighted_modules(network: TorchNetwork) -> set[str]:
    """Names of the convolutions and linear layers, also of those that a user wrote: parameters, and no norm."""
    nn = network.torch.nn
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    others = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)

    def weighted(name: str, module: Any) -> bool:
        own = any(parameter is not None for parameter in module._parameters.values())
        return own and not isinstance(module, others) and "parametrizations" not in name.split(".")

    return {n for n, m in network.model.named_modules() if isinstance(m, layers) or weighted(n, m)}
