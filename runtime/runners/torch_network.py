"""A network in torch as timings of it see it: what the torch runner, its queries and its layer times share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from gmconv.errors import UnavailableError
from runtime.manifest import TensorSpec
from runtime.runners.base import Array, parse_device

Tensor = Any  # torch's: only the runner imports it
Tensors = tuple[Tensor, ...]


class TorchNetwork(Protocol):
    """A module on a device: `torch` the package, `place` a `torch.device`, `call` the module or its compiled form."""

    torch: Any
    place: Any
    model: Any
    call: Callable[..., Any]
    inputs: tuple[TensorSpec, ...]

    def tensors(self, feeds: Mapping[str, Array]) -> Tensors:
        """Arrays as the arguments of `call`, on the device."""

    def mode(self) -> AbstractContextManager[None]:
        """To run in: no gradients, this device, TF32 as asked for."""

    def capture(self, tensors: Tensors) -> Captured | None:
        """A CUDA graph of the run on inputs like these, inside `mode`; None where there can be none."""

    def named(self, outputs: Any) -> dict[str, Tensor]:
        """What `call` returned, by name."""


class Captured:
    """One CUDA graph of a network, with its static `inputs` and output. The device is torch's current one."""

    def __init__(self, torch: Any, call: Callable[..., Any], examples: Tensors) -> None:
        self.inputs = tuple(example.clone() for example in examples)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their kernels before the capture
            for _ in range(3):
                call(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):  # torch's own default is a stream of whichever GPU was first
            self._output = call(*self.inputs)

    def __call__(self, *tensors: Tensor) -> Any:
        """The network's output, good until the next call; its own `inputs` are not copied."""
        for own, given in zip(self.inputs, tensors, strict=True):
            if given is not own:
                own.copy_(given)
        self._graph.replay()
        return self._output


def torch_device(torch: Any, device: str) -> Any:
    """`torch.device` of "cpu", "cuda" or "cuda:N". Raises UnavailableError where torch does not see it."""
    kind, index = parse_device(device)
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"torch {torch.__version__} finds no GPU: it needs a CUDA build and an NVIDIA driver; use --device cpu"
        )
    if index >= torch.cuda.device_count():
        raise UnavailableError(f"torch finds {torch.cuda.device_count()} GPUs; {device!r} was asked for")
    return torch.device("cuda", index)
