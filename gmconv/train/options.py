"""What a training run is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmconv.errors import CheckpointError


def state_path(output: Path) -> Path:
    """Where the state of the run that writes `output` lies: `ckpt.last.pt` for `ckpt.pt`."""
    return output.with_name(f"{output.stem}.last{output.suffix}")


def qualified(arch: str) -> str:
    """An architecture as checkpoints name it."""
    return arch if ":" in arch else f"gmconv.models:{arch}"


def output_path(state: Path) -> Path:
    """The checkpoint that the run of a state writes. Raises CheckpointError where the name does not say."""
    if not state.stem.endswith(".last"):
        beside = state_path(state)
        advice = f"resume from {beside}" if beside.is_file() else "the state of a run is NAME.last.pt, until it is done"
        what = "is no state of a training run" if state.exists() else "no such file"
        raise CheckpointError(f"{state}: {what}: {advice}")
    return state.with_name(state.stem.removesuffix(".last") + state.suffix)


def is_own(arch: str) -> bool:
    """Whether an architecture is the user's own factory, which a file may name but not choose."""
    namespace, colon, _ = arch.rpartition(":")
    return bool(colon) and namespace not in ("gmconv.models", "timm", "torchvision")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What `train` needs to know; the defaults reach 99 % on digits with resnet20 in 8 epochs.

    `arch` is a name of `gmconv.models`, `timm:NAME`, `torchvision:NAME` or the user's own `package.module:factory`;
    `gmconv` False: no masks are put on it. `input_shape` is (C, H, W). `sigma` is the initial one, in taps, and
    `sigma_lr` its learning rate. `shift` is the augmentation's largest translation in pixels (None: an eighth of the
    height).
    """

    arch: str
    dataset: str = "digits"
    gmconv: bool = True
    seed: int = 1
    epochs: int = 8
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.05
    sigma: float = 5.0
    sigma_per: str = "layer"
    sigma_lr: float = 0.02
    sigma_penalty: float = 0.0
    crop_tolerance: float = 1e-3
    kernel_size: int | None = None
    input_shape: tuple[int, int, int] = (3, 32, 32)
    test_size: float = 0.2
    split_seed: int = 0
    shift: int | None = None
    flip: bool = False
    bf16: bool = False
    device: str = "cpu"

    def recorded(self) -> dict[str, Any]:
        """All but the place of the data, which is nobody's business."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "dataset"}
