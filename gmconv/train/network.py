"""The network to train: of the zoo, of timm or torchvision, or of the user's own factory; masked where it is plain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmconv.architecture import build, factory_keywords
from gmconv.errors import CheckpointError, type_words
from gmconv.layer import GMConv2d
from gmconv.surgery import convert, masked_layers
from gmconv.train.options import TrainOptions, is_own, qualified


@dataclass(frozen=True, slots=True)
class Network:
    """`model` as it is trained, and what rebuilds it: `arch` and its keyword arguments. `note`: what was masked."""

    model: nn.Module
    arch: str
    kwargs: dict[str, Any]
    note: str = ""

    @property
    def layout(self) -> torch.memory_format:
        """Channels last is faster, and a stranger's forward that flattens by `view` does not run in it."""
        return torch.channels_last if self.arch.startswith("gmconv.models:") else torch.contiguous_format

    @property
    def own(self) -> bool:
        """Whether the factory is the user's, which a checkpoint may name but not choose."""
        return is_own(self.arch)


def make_network(options: TrainOptions, num_classes: int) -> Network:
    """Build and mask what `options` name, and run it once on zeros.

    A network of the zoo is masked as the zoo does; of any other each plain `nn.Conv2d` larger than 1x1 becomes a
    GMConv2d, unless its factory puts GMConv2d layers into it, or `options.gmconv` is False.

    Raises:
        CheckpointError: unknown, not built by these arguments, unfit for the input, or giving anything but logits.
        ArchitectureUnavailableError: its package is not installed.
        SurgeryError: a layer cannot be masked.
    """
    arch = qualified(options.arch)
    where, zoo = f"--arch {options.arch}", arch.startswith("gmconv.models:")
    kwargs = _arguments(arch, options, num_classes, where)
    model = build(arch, kwargs, where, trusted=True)
    model.train()
    note = ""
    if options.gmconv and not masked_layers(model):
        convert(model, options.sigma, options.sigma_per, subclasses="skip", inplace=True)  # type: ignore[arg-type]
        note = _masked_note(model)
    elif options.gmconv:
        note = f"trained with the {len(masked_layers(model))} GMConv2d layers that its factory makes"
    if options.sigma_penalty and not masked_layers(model):
        raise CheckpointError(f"{where}: has no GMConv2d whose sigma could be penalized; drop --sigma-penalty")
    _require_fit(model, options, num_classes, where)
    return Network(model, arch, kwargs, "" if zoo else note)


def _masked_note(model: nn.Module) -> str:
    """How many convolutions were masked, and which were left as they are, and why."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        return "it has no nn.Conv2d to mask, and trains as its factory makes it"
    left = [module for module in convolutions if not isinstance(module, GMConv2d)]
    own = [type(module).__name__ for module in left if tuple(module.kernel_size) != (1, 1)]
    reasons = [f"{len(left) - len(own)} of 1x1 kernels, which need no mask"] if len(left) > len(own) else []
    if own:
        classes = ", ".join(dict.fromkeys(own))
        reasons.append(f"{len(own)} with a forward of their own ({classes}), left as their factory makes them")
    done = f"{len(convolutions) - len(left)} of {len(convolutions)} nn.Conv2d became GMConv2d (--plain: none)"
    return "; ".join((done, *reasons))


def _arguments(arch: str, options: TrainOptions, num_classes: int, where: str) -> dict[str, Any]:
    """Keyword arguments of the factory, which rebuild the network too."""
    channels, namespace = options.input_shape[0], arch.partition(":")[0]
    wanted: dict[str, Any] = {"num_classes": num_classes, "in_channels": channels}
    if options.kernel_size is not None:
        wanted["kernel_size"] = options.kernel_size
    if namespace == "gmconv.models":
        masks = {"sigma": options.sigma, "sigma_per": options.sigma_per} if options.gmconv else {}
        return {"gmconv": options.gmconv, **wanted, **masks}
    taken = {"timm": {"num_classes", "in_channels"}, "torchvision": {"num_classes"}}.get(namespace)
    taken = factory_keywords(arch, where) if taken is None else taken
    if "kernel_size" in wanted and "kernel_size" not in taken:
        raise CheckpointError(f"{where}: takes no kernel_size; leave --kernel-size out")
    given = {name: value for name, value in wanted.items() if name in taken}
    if namespace == "timm":
        del given["in_channels"]
        given |= {"in_chans": channels} if channels != 3 else {}
    return given


def _require_fit(model: nn.Module, options: TrainOptions, num_classes: int, where: str) -> None:
    """Refuse an input too small for the network's pools and strides, and other outputs than logits, at once."""
    state = {
        key: value.clone() for key, value in model.state_dict().items() if "running" in key or "num_batches" in key
    }
    shape = "x".join(map(str, options.input_shape))
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *options.input_shape))
    except Exception as error:  # a forward is somebody's own code
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{where}: cannot train on {shape} input ({reason}); give a larger --input-shape, or the one it takes"
        ) from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, num_classes):
        wrong = isinstance(logits, Tensor) and logits.shape[:1] != (2,)
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type_words(logits)
        raise CheckpointError(
            f"{where}: gives {found} for two images; training needs logits, one per class: (2, {num_classes}) for the "
            f"{num_classes} classes of the data{f'; is {shape} the --input-shape it takes?' if wrong else ''}"
        )
    model.load_state_dict(state, strict=False)
