"""The training loop behind `python -m gmconv.train`."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmconv.checkpoint import save_checkpoint
from gmconv.checkpoint.file import read_file
from gmconv.errors import CheckpointError
from gmconv.files import require_writable, unwritable
from gmconv.kinds import require_ending
from gmconv.surgery import masked_layers
from gmconv.train.data import Dataset, Samples, batches, load_dataset
from gmconv.train.network import Network, make_network
from gmconv.train.options import TrainOptions, state_path
from gmconv.train.penalty import LayerReach, reach, sigma_penalty
from gmconv.train.refusals import refuse_replacing
from gmconv.train.resume import RunState, data_identity, random_state, restore_random, write_state


class TrainingError(click.ClickException):
    """Exit 5: training did not yield a network."""

    exit_code = 5


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training data: mean loss (the penalty left out), and what the held-out images said after it."""

    epoch: int
    loss: float
    held_out_loss: float
    held_out_accuracy: float

    def better_than(self, other: Epoch) -> bool:
        """Higher held-out accuracy, or the same with a lower loss."""
        return (self.held_out_accuracy, -self.held_out_loss) > (other.held_out_accuracy, -other.held_out_loss)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The best epoch (held-out accuracy, then loss), every epoch, and each layer's reach at the crop tolerance.

    `commonest` of the `held_out_images` are of one class. `network` says what was trained; its weights are those of
    the best epoch.
    """

    best: Epoch
    history: tuple[Epoch, ...]
    layers: tuple[LayerReach, ...]
    held_out_images: int
    commonest: int
    network: Network

    @property
    def learned(self) -> bool | None:
        """Whether its accuracy is above always naming that class, by two standard deviations of such a guess.

        None: above by less, or there are too few images for any accuracy to be.
        """
        share = self.commonest / self.held_out_images
        needed = share + 2 * math.sqrt(share * (1 - share) / self.held_out_images)
        if self.best.held_out_accuracy > needed:
            return True
        return False if self.best.held_out_accuracy <= share and needed < 1 else None

    @property
    def macs_kept(self) -> float:
        """Share of the convolutions' multiply-adds that is left after cropping."""
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.kept_macs for layer in self.layers) / total if total else 1.0


def train(
    options: TrainOptions,
    output: Path,
    on_step: Callable[[Epoch | None], None] = lambda epoch: None,
    resume: RunState | None = None,
    *,
    force: bool = False,
    named: bool = True,
) -> TrainResult:
    """Train and write the best epoch's checkpoint to `output` (atomically, each time it improves).

    The same options on the same machine and thread count give the same file, also where `resume` goes on with a run
    that stopped: until it is done its state lies beside `output` (`gmconv.train.options.state_path`). `on_step` is
    called with None after each optimizer step and with the `Epoch` after each epoch. `named`: whether anybody chose
    `output`; under a name that nobody chose only a network of the same architecture and data is replaced.

    Raises:
        RefusedError: unless `force`: `output` is there and no checkpoint of `train`, or a run that stopped is.
        DataError: the data was refused.
        CheckpointError: the network is unknown, does not fit the input, or the checkpoint cannot be written.
        TrainingError: the loss became NaN or infinite.
    """
    _require_writable(output)
    if resume is not None or not force:
        refuse_replacing(output, options, named=named, resumed=resume is not None)
    torch.manual_seed(options.seed)
    data = load_dataset(options.dataset, options.input_shape, options.test_size, options.split_seed)
    network = make_network(options, len(data.labels))
    model = network.model.to(options.device, memory_format=network.layout)  # type: ignore[call-overload]
    run = _Run(network, torch.optim.AdamW(parameter_groups(model, options), lr=options.lr), data, options, on_step)
    if resume is not None:
        run.restore(resume, output)
    try:
        while len(run.history) < options.epochs:
            epoch = run.epoch(len(run.history) + 1)
            if not run.history:
                state_path(output).unlink(missing_ok=True)  # by force: its best epoch is replaced next
            run.history.append(epoch)
            if run.best is epoch:
                run.layers = _save(output, run)
            write_state(state_path(output), run.state())
            on_step(epoch)
    except TrainingError:
        if run.history:
            state_path(output).unlink(missing_ok=True)  # what is resumed would diverge again
        raise
    if run.best is not run.history[-1]:  # the best weights once more, now with the whole history beside them
        model.load_state_dict(read_file(output)["state_dict"])
        _save(output, run)
    state_path(output).unlink(missing_ok=True)
    targets = data.held_out.targets
    commonest = int(torch.from_numpy(targets).bincount().max())
    return TrainResult(run.best, tuple(run.history), run.layers, len(targets), commonest, network)


def parameter_groups(model: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """The optimizer's groups: weights with decay; vectors without; sigmas without, and at their own learning rate."""
    sigmas = {id(layer.sigma): layer.sigma for layer in masked_layers(model).values()}
    rest = [p for p in model.parameters() if id(p) not in sigmas]
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": [p for p in rest if p.ndim > 1], "weight_decay": options.weight_decay},
        {"name": "vectors", "params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {"name": "sigma", "params": list(sigmas.values()), "weight_decay": 0.0, "lr": options.sigma_lr},
    ]
    return [group for group in groups if group["params"]]


def schedule(step: int, steps_per_epoch: int, epochs: int) -> float:
    """Factor on every learning rate: linear warm-up (two epochs, at most a quarter), under a cosine that ends at 0."""
    total = steps_per_epoch * epochs
    warmup = max(1, min(2 * steps_per_epoch, total // 4))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total))


def augment(images: Tensor, shift: int, flip: bool) -> Tensor:
    """Each image (N, C, H, W) moved by up to `shift` pixels on either axis, zeros coming in; half of them mirrored."""
    count, _, height, width = images.shape
    if flip:
        mirrored = (torch.rand(count) < 0.5).view(-1, 1, 1, 1)
        images = torch.where(mirrored, images.flip(-1), images)
    if shift:
        padded = F.pad(images, (shift,) * 4)
        rows = torch.randint(0, 2 * shift + 1, (count, 1)) + torch.arange(height)
        columns = torch.randint(0, 2 * shift + 1, (count, 1)) + torch.arange(width)
        images = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
            0, 3, 1, 2
        )
    return images


@dataclass(slots=True)
class _Run:
    network: Network
    optimizer: torch.optim.Optimizer
    data: Dataset
    options: TrainOptions
    on_step: Callable[[Epoch | None], None]
    history: list[Epoch] = field(default_factory=list)
    layers: tuple[LayerReach, ...] = ()

    @property
    def model(self) -> nn.Module:
        return self.network.model

    @property
    def best(self) -> Epoch:
        """The first of those that no other is better than."""
        return functools.reduce(lambda best, epoch: epoch if epoch.better_than(best) else best, self.history)

    def state(self) -> RunState:
        """All that the next epoch depends on."""
        return RunState(
            options=self.options.recorded(),
            data=data_identity(self.data),
            history=[dataclasses.asdict(epoch) for epoch in self.history],
            layers=[dataclasses.asdict(layer) for layer in self.layers],
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            random=random_state(self.options.device),
        )

    def restore(self, state: RunState, output: Path) -> None:
        """Be where the run was that `state` is of, whose best epoch is in `output`. Raises CheckpointError."""
        if state.data != data_identity(self.data):
            raise CheckpointError(
                f"{self.options.dataset}: is not the data that the run began with; give that as --data, or train anew"
            )
        if not output.is_file():
            raise CheckpointError(f"{output}: the best epoch of the run is not there; put it back, or train anew")
        try:
            self.model.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)
            self.history = [Epoch(**epoch) for epoch in state.history]
            self.layers = tuple(LayerReach(**layer) for layer in state.layers)
            restore_random(state.random, self.options.device)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{state_path(output)}: does not fit the network ({reason}); train anew") from error

    def epoch(self, number: int) -> Epoch:
        """Train for one epoch, then measure."""
        options = self.options
        shift = options.input_shape[1] // 8 if options.shift is None else options.shift
        order = torch.randperm(len(self.data.train.targets)).numpy()
        plan = batches(len(order), options.batch_size, order)
        peaks = [group.setdefault("peak_lr", group["lr"]) for group in self.optimizer.param_groups]
        self.model.train()
        losses: list[float] = []
        for index, indices in enumerate(plan):
            factor = schedule((number - 1) * len(plan) + index, len(plan), options.epochs)
            for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            images = augment(torch.from_numpy(self.data.train.batch(indices)), shift, options.flip)
            targets = torch.from_numpy(self.data.train.targets[indices]).to(options.device)
            loss = F.cross_entropy(self._logits(images).float(), targets)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise _diverged(losses[-1], number)
            if options.sigma_penalty:
                loss = loss + options.sigma_penalty * sigma_penalty(self.model)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.on_step(None)
        held_out_loss, accuracy = self.measure(self.data.held_out)
        if not math.isfinite(held_out_loss):
            raise _diverged(held_out_loss, number)
        return Epoch(number, sum(losses) / len(losses), held_out_loss, accuracy)

    def measure(self, samples: Samples) -> tuple[float, float]:
        """Mean cross entropy and top-1 accuracy in eval mode, float32."""
        self.model.eval()
        loss, correct = 0.0, 0
        with torch.no_grad():
            for indices in batches(len(samples.targets), 128):
                images = torch.from_numpy(samples.batch(indices))
                logits = self.model(self._to_device(images))
                targets = torch.from_numpy(samples.targets[indices]).to(self.options.device)
                loss += float(F.cross_entropy(logits, targets, reduction="sum"))
                correct += int((logits.argmax(1) == targets).sum())
        return loss / len(samples.targets), correct / len(samples.targets)

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.options.device).type, torch.bfloat16, enabled=self.options.bf16):
            logits: Tensor = self.model(self._to_device(images))
        return logits

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.options.device, memory_format=self.network.layout)


def _diverged(loss: float, epoch: int) -> TrainingError:
    return TrainingError(
        f"the loss became {loss} in epoch {epoch}, which was not saved (an earlier epoch may have been): lower --lr "
        f"or --sigma-lr"
    )


def _save(output: Path, run: _Run) -> tuple[LayerReach, ...]:
    network, data, options, model = run.network, run.data, run.options, run.model
    layers = reach(model, options.input_shape, options.crop_tolerance)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    save_checkpoint(
        output,
        model,
        network.arch,
        options.input_shape,
        network.kwargs,
        preprocessing=data.preprocessing,
        labels=data.labels,
        dataset=data.record,
        training={
            "dataset": data.name,
            "options": options.recorded(),
            "best_epoch": run.best.epoch,
            "held_out_accuracy": run.best.held_out_accuracy,
            "held_out_images": len(data.held_out.targets),
            "history": [dataclasses.asdict(epoch) for epoch in run.history],
            "macs": sum(layer.macs for layer in layers),
            "macs_kept": sum(layer.kept_macs for layer in layers),
        },
    )
    model.to(memory_format=network.layout)  # type: ignore[call-overload]
    return layers


def _require_writable(output: Path) -> None:
    """An hour of training should not end at a folder that cannot be written to."""
    require_writable(output)
    require_ending(output, "checkpoint")
    try:
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise unwritable(output, error, "; choose another -o", CheckpointError) from error
