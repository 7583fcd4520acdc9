"""What a network takes: one image, or several tensors by the names of its forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gmconv.errors import RefusedError, printable
from gmconv.surgery import network_within

Array = NDArray[Any]
Sides = Literal["own", "larger", "odd", "smaller"]
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Input:
    """One input: its name, the shape of one sample (without the batch), its numpy dtype.

    `between`: the smallest and largest value of an integer input, e.g. the classes that an embedding knows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    between: tuple[int, int] = (0, 1)

    @property
    def is_image(self) -> bool:
        """Whether it may be one: `(C, H, W)` of floating point."""
        return len(self.shape) == 3 and "float" in self.dtype


@dataclass(frozen=True, slots=True)
class Arguments:
    """Inputs in the order of the forward's arguments, and one batch of each by name."""

    inputs: tuple[Input, ...]
    tensors: dict[str, Tensor]

    def call(self, model: nn.Module, device: torch.device) -> Any:
        """What `model` returns for them; a forward may write into its copies."""
        return model(*(self.tensors[given.name].to(device, copy=True) for given in self.inputs))


def arguments_of(model: nn.Module, examples: Any) -> Arguments:
    """Examples as `Arguments`: a tensor (named "input"), a list or tuple of tensors, or a dict of arguments.

    Raises RefusedError when they are no tensors, have no batch axis, differ in it, or are no arguments of the forward.
    """
    if isinstance(examples, Mapping):
        if len(examples) > 1 and not _positional(model):
            raise RefusedError(
                "the network's forward takes *args, so which argument is called what is not known: give a tuple of "
                "examples in its order, or the network within it"
            )
        named = {str(name): value for name, value in examples.items()}
    else:
        given: Sequence[Any] = examples if isinstance(examples, list | tuple) else [examples]
        names = _positional(model)
        names += [f"input_{index}" for index in range(len(names), len(given))]
        named = dict(zip(["input"] if len(given) == 1 else names, given, strict=False))
    if not named:
        raise RefusedError("no example was given; pass a tensor, or a tuple with one for each argument")
    tensors = {name: _tensor(name, value) for name, value in named.items()}
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise RefusedError(f"the example {empty[0]!r} is on the meta device and has no values")
    if damaged := [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.isnan().any()]:
        raise RefusedError(f"the example {damaged[0]!r} holds NaN")
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        said = ", ".join(f"{name} {len(tensor)}" for name, tensor in tensors.items())
        raise RefusedError(f"the examples hold different numbers of samples along axis 0: {said}")
    inputs = in_order(model, [_described(name, tensor) for name, tensor in tensors.items()])
    return Arguments(inputs, {given.name: tensors[given.name] for given in inputs})


def in_order(model: nn.Module, inputs: Sequence[Input]) -> tuple[Input, ...]:
    """Inputs in the order of `model`'s forward; one alone may have any name.

    Raises RefusedError when the forward has arguments of other names, or others before one of these.
    """
    known, names = _positional(model), [given.name for given in inputs]
    if len(inputs) == 1 or not known:
        return tuple(inputs)
    if unknown := [name for name in names if name not in known and not name.startswith("input_")]:
        raise RefusedError(
            f"the network's forward takes by position {', '.join(known)}; there is no {unknown[0]!r} among them"
        )
    order = [name for name in known if name in names] + [name for name in names if name not in known]
    if gap := [name for name, place in zip(order, known, strict=False) if name != place]:
        missing = next(name for name in known if name not in names)
        raise RefusedError(f"the network's forward takes {missing!r} before {gap[0]!r}; give it too")
    by_name = {given.name: given for given in inputs}
    return tuple(by_name[name] for name in order)


def left_out(model: nn.Module, inputs: Sequence[Input]) -> tuple[str, ...]:
    """A note on what `model`'s forward takes too and has a default for, where there is any."""
    parameters = forward_parameters(model)
    known = [parameter for parameter in parameters if parameter.kind in _POSITIONAL][len(inputs) :]
    known += [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    defaults = [(one.name, printable(repr(one.default), 40)) for one in known if one.default is not one.empty]
    return tuple(f"{name} is not given: exported as its default, {default}" for name, default in defaults)


def does_not_run(
    model: nn.Module, inputs: Sequence[Input], error: Exception, batch: int | None, advice: str
) -> RefusedError:
    """What is said where a forward, which is somebody's own code, raised `error` on such inputs."""
    reason = printable(" ".join(str(error).split()) or type(error).__name__, 300)
    shapes = ", ".join("x".join(map(str, given.shape)) or "one number" for given in inputs)
    shapes += f" in a batch of {batch}" if batch else ""
    takes = ", ".join(parameter.name for parameter in forward_parameters(model))
    return RefusedError(
        f"the network, whose forward takes ({takes}), does not run on samples of {shapes} ({reason}); {advice}"
    )


def forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """What the forward takes, also that of a network in wrappers, which take anything, and a traced one."""
    forward = network_within(model).forward
    try:
        return list(inspect.signature(forward).parameters.values())
    except ValueError:  # of code that is not Python
        schema = getattr(forward, "schema", None)
        names = [argument.name for argument in schema.arguments[1:]] if schema else []
        known = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
        return known or [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


def noise(
    inputs: Sequence[Input], samples: int, seed: int | Sequence[int] = 0, *, sides: Sides = "own"
) -> dict[str, Array]:
    """A batch of every input: standard normal, integers between what the input says, bools of both kinds.

    `sides`: images of another height and width: "larger" ones (multiples of 8), larger "odd" ones, "smaller" odd ones.
    """
    generator = np.random.default_rng(seed)
    feeds = {}
    for given in inputs:
        shape = (samples, *given.shape)
        if given.is_image:
            shape = (samples, given.shape[0], *other_sides(given.shape[1], given.shape[2], sides))
        if "float" in given.dtype:
            values: Array = generator.standard_normal(shape, dtype=np.float32)
        else:
            low, high = (0, 1) if given.dtype == "bool" else given.between
            values = generator.integers(low, high, shape, endpoint=True)
        feeds[given.name] = values.astype("float32" if given.dtype == "bfloat16" else given.dtype)
    return feeds


def tensors_of(
    model: nn.Module, inputs: Sequence[Input], feeds: Mapping[str, Array], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Arrays as the arguments of `model`'s forward, those of floating point in its dtype, or in `dtype`."""
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tensors = (torch.from_numpy(feeds[given.name].copy()) for given in inputs)  # a forward may write into them
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def _positional(model: nn.Module) -> list[str]:
    return [parameter.name for parameter in forward_parameters(model) if parameter.kind in _POSITIONAL]


def _described(name: str, tensor: Tensor) -> Input:
    dtype = str(tensor.dtype).removeprefix("torch.")
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.numel() > 0
    between = (int(tensor.min()), int(tensor.max())) if whole else (0, 1)
    return Input(name, tuple(tensor.shape[1:]), dtype, between)


def other_sides(height: int, width: int, sides: Sides) -> tuple[int, int]:
    """Another height and width that a network with free sides may be given; see `noise`."""
    if sides == "larger":
        return _larger(height), _larger(width) + 32
    if sides == "odd":
        return height + height // 4 | 1, width + width // 3 | 1
    if sides == "smaller":
        return max(1, height * 3 // 4) | 1, max(1, width * 2 // 3) | 1
    return height, width


def _larger(pixels: int) -> int:
    return (pixels + pixels // 4 + 7) // 8 * 8


def _tensor(name: str, value: Any) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value) if hasattr(value, "__array__") else None
    if tensor is None:
        raise RefusedError(
            f"example {name!r} is no tensor ({type(value).__name__}); pass one batch of each input, "
            f"torch.randn(1, 3, 64, 64) where only its shape matters"
        )
    if not tensor.ndim or not len(tensor):
        raise RefusedError(f"example {name!r} holds no samples along axis 0; pass a tensor with one row per sample")
    return tensor
