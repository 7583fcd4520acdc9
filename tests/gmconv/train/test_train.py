"""Training: seeded, sigma in its own group, the best epoch kept, one sentence for what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import gmconv
from gmconv.errors import RefusedError
from gmconv.train.__main__ import _goes_on, main
from gmconv.train.data import digits
from gmconv.train.loop import Epoch, TrainingError, TrainResult, augment, parameter_groups, schedule, train
from gmconv.train.options import TrainOptions

Cli = Callable[..., subprocess.CompletedProcess[str]]

TINY = TrainOptions(arch="resnet8", epochs=1, input_shape=(1, 8, 8), batch_size=128, seed=3)
TINY_ARGS = ("--epochs", "1", "--arch", "resnet8", "--input-shape", "1,8,8", "--batch-size", "128")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("train") / "ckpt.pt"
    return output, train(dataclasses.replace(TINY, epochs=2), output)


def test_a_checkpoint_holds_the_best_epoch_and_all_that_export_needs(trained: tuple[Path, Any]) -> None:
    output, result = trained
    checkpoint = gmconv.load_checkpoint(output)
    assert checkpoint.arch == "gmconv.models:resnet8"
    assert checkpoint.input_shape == (1, 8, 8)
    assert checkpoint.labels == tuple("0123456789")
    assert checkpoint.dataset == {"name": "digits", "test_size": 0.2, "split_seed": 0}
    assert checkpoint.preprocessing is not None
    assert checkpoint.preprocessing["scale"] == 1 / 255
    assert checkpoint.training is not None
    assert checkpoint.training["held_out_accuracy"] == result.best.held_out_accuracy
    assert checkpoint.training["best_epoch"] == result.best.epoch
    assert checkpoint.training["history"] == [dataclasses.asdict(epoch) for epoch in result.history]
    assert result.best.held_out_accuracy == max(epoch.held_out_accuracy for epoch in result.history)


def test_the_reported_accuracy_is_that_of_the_saved_network(trained: tuple[Path, Any]) -> None:
    output, result = trained
    checkpoint = gmconv.load_checkpoint(output)
    held_out = digits((1, 8, 8)).held_out
    with torch.no_grad():
        guess = checkpoint.model(torch.from_numpy(held_out.batch(np.arange(360)))).argmax(1).numpy()
    assert (guess == held_out.targets).mean() == pytest.approx(result.best.held_out_accuracy, abs=1e-9)
    assert result.best.held_out_accuracy > 0.3


def test_one_seed_gives_one_file_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(dataclasses.replace(TINY, seed=seed), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_sigma_learns_in_its_own_group_without_weight_decay() -> None:
    options = dataclasses.replace(TINY, weight_decay=0.1, sigma_lr=0.5)
    model = gmconv.models.resnet20()
    groups = {group["name"]: group for group in parameter_groups(model, options)}
    sigmas = {id(p) for name, p in model.named_parameters() if name.endswith("sigma")}
    assert {id(p) for p in groups["sigma"]["params"]} == sigmas
    assert len(sigmas) == 19
    assert (groups["sigma"]["weight_decay"], groups["sigma"]["lr"]) == (0.0, 0.5)
    assert groups["vectors"]["weight_decay"] == 0.0
    assert groups["weights"]["weight_decay"] == 0.1
    assert sorted(id(p) for g in groups.values() for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert "sigma" not in {g["name"] for g in parameter_groups(gmconv.models.resnet20(gmconv=False), options)}


def test_sigmas_move_and_the_twin_has_none(tmp_path: Path, trained: tuple[Path, Any]) -> None:
    layers = gmconv.load_checkpoint(trained[0]).model
    moved = [m.sigma.item() for m in layers.modules() if isinstance(m, gmconv.GMConv2d)]
    assert len(moved) == 7
    assert all(sigma != 5.0 for sigma in moved)
    train(dataclasses.replace(TINY, gmconv=False), tmp_path / "plain.pt")
    plain = gmconv.load_checkpoint(tmp_path / "plain.pt").model
    assert not any(isinstance(m, gmconv.GMConv2d) for m in plain.modules())
    assert set(plain.state_dict()) == {k for k in layers.state_dict() if not k.endswith("sigma")}


@pytest.mark.parametrize(
    ("right", "images", "commonest", "learned"),
    [
        (100, 300, 100, False),
        (90, 300, 100, False),
        (102, 300, 100, None),
        (150, 300, 100, True),
        (300, 300, 100, True),
        (18, 48, 12, None),
        (4, 4, 3, None),
        (2, 4, 2, None),
        (0, 4, 2, None),
    ],
)
def test_what_always_naming_one_class_would_reach_was_not_learned_where_that_can_be_told(
    right: int, images: int, commonest: int, learned: bool | None
) -> None:
    best = Epoch(1, 1.0, 1.1, right / images)
    assert TrainResult(best, (best,), (), images, commonest, cast("Any", None)).learned is learned


def test_few_images_are_said_to_tell_nothing(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "few.npz", input=images, labels=np.arange(20) % 2)
    done = CliRunner().invoke(main, [*TINY_ARGS, "--data", str(tmp_path / "few.npz"), "-o", str(tmp_path / "c.pt")])
    assert "4 held-out images cannot tell whether anything was learned: always naming" in done.stderr


def test_an_epoch_is_better_by_accuracy_then_loss() -> None:
    assert Epoch(2, 0, 0.9, 0.8).better_than(Epoch(1, 0, 0.1, 0.7))
    assert Epoch(2, 0, 0.1, 0.8).better_than(Epoch(1, 0, 0.2, 0.8))
    assert not Epoch(2, 0, 0.2, 0.8).better_than(Epoch(1, 0, 0.2, 0.8))
    assert not Epoch(2, 0, math.nan, 0.7).better_than(Epoch(1, 0, 0.2, 0.8))


@given(steps=st.integers(1, 100), epochs=st.integers(1, 50))
def test_the_schedule_warms_up_then_falls_to_zero(steps: int, epochs: int) -> None:
    factors = [schedule(step, steps, epochs) for step in range(steps * epochs)]
    peak = factors.index(max(factors))
    assert 0 < max(factors) <= 1
    assert peak <= max(1, steps * epochs // 4)
    assert all(a > b for a, b in zip(factors[peak:], factors[peak + 1 :], strict=False))
    assert min(factors) > 0
    assert schedule(steps * epochs, steps, epochs) == pytest.approx(0)


def test_augmentation_shifts_by_at_most_what_it_says_and_brings_in_zeros() -> None:
    torch.manual_seed(0)
    image = torch.zeros(200, 2, 9, 7)
    image[:, :, 4, 3] = 1.0
    moved = augment(image, shift=2, flip=False)
    rows, columns = moved[:, 0].flatten(1).argmax(1) // 7, moved[:, 0].flatten(1).argmax(1) % 7
    assert moved.shape == image.shape
    assert moved.sum() == image.sum()
    assert set(rows.tolist()) == {2, 3, 4, 5, 6}
    assert set(columns.tolist()) == {1, 2, 3, 4, 5}
    assert torch.equal(augment(image, shift=0, flip=False), image)
    mirrored = augment(torch.arange(4.0).view(1, 1, 1, 4).expand(100, 1, 1, 4), shift=0, flip=True)
    assert {tuple(row.tolist()) for row in mirrored[:, 0, 0]} == {(0.0, 1.0, 2.0, 3.0), (3.0, 2.0, 1.0, 0.0)}


def test_the_sigma_penalty_shrinks_sigmas_in_training(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, sigma_lr=0.2)
    free = train(options, tmp_path / "free.pt")
    held = train(dataclasses.replace(options, sigma_penalty=3.0), tmp_path / "held.pt")
    assert all(a.sigma < b.sigma for a, b in zip(held.layers, free.layers, strict=True))


def test_json_is_on_stdout_and_progress_on_stderr(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*TINY_ARGS, "--json", "-o", str(tmp_path / "c.pt"), "--sigma-penalty", "0.1"])
    result = json.loads(done.stdout)
    assert result["held_out_images"] == 360
    assert 0 <= result["held_out_accuracy"] <= 1
    assert 0 < result["macs_kept"] <= 1
    assert len(result["layers"]) == 7
    assert "epoch 1/1" in done.stderr


def test_an_image_folder_trains_too(tmp_path: Path) -> None:
    for name, low in (("dark", 0), ("light", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(10):
            pixels = np.random.default_rng(index).integers(low, low + 50, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    shape = ("--input-shape", "3,16,16", "--epochs", "3", "--batch-size", "5", "--flip")
    command = ["--dataset", str(tmp_path / "data"), *shape, "-q", "-o", str(tmp_path / "c.pt")]
    assert CliRunner().invoke(main, command).exit_code == 0
    checkpoint = gmconv.load_checkpoint(tmp_path / "c.pt")
    assert checkpoint.labels == ("dark", "light")
    assert checkpoint.preprocessing is not None
    assert checkpoint.preprocessing["resize"] == "shortest-then-crop"
    assert checkpoint.dataset is not None
    assert (checkpoint.dataset["name"], checkpoint.dataset["samples"]) == ("folder", 20)
    assert str(tmp_path).encode() not in (tmp_path / "c.pt").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--arch", "resnet21"), 3, "did you mean"),
        (("--arch", "alexnet"), 3, "larger --input-shape"),
        (("--arch", "resnet18", "--kernel-size", "5"), 3, "takes no kernel_size"),
        (("--dataset", "nowhere"), 3, "no such folder"),
        (("--input-shape", "3,30,30"), 3, "multiples of 8"),
        (("-o", "nowhere/ckpt.pt"), 3, "cannot be written"),
        (("-o", "."), 3, "is a directory"),
        (("--kernel-size", "4"), 2, "even"),
        (("--kernel-size", "1"), 2, "nothing to mask"),
        (("--sigma", "0"), 2, "range"),
        (("--plain", "--sigma-penalty", "1"), 2, "no sigma to penalize"),
        (("--input-shape", "32,32"), 2, "C,H,W"),
        (("--input-shape", "3,99999,8"), 2, "larger than 16384"),
        (("--arch", "nets.py:make"), 3, "name the module: nets:make"),
        (("--resume", "gone.last.pt"), 3, "no such file"),
        (("--log", "nowhere/log.csv"), 3, "no folder nowhere"),
        (("--lr", "nan"), 2, "finite"),
        (("--sigma-penalty", "-1"), 2, "range"),
        (("--crop-tolerance", "1"), 2, "below 1"),
        (("--epochs", "0"), 2, "range"),
    ],
)
def test_bad_input_is_refused_before_training_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code
    assert said in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_says_what_to_lower(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lower --lr") as refusal:
        train(dataclasses.replace(TINY, epochs=2, lr=1e30), tmp_path / "c.pt")
    assert refusal.value.exit_code == 5


def test_an_output_whose_folder_is_gone_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="cannot be written"):
        train(TINY, tmp_path / "gone" / "c.pt")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_who_stops_it_keeps_the_best_finished_epoch_and_reads_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    output, state = tmp_path / "c.pt", tmp_path / "c.last.pt"
    command = [sys.executable, "-m", "gmconv.train", "--epochs", "500", *TINY_ARGS[2:], "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"Error: {word}; the best epoch" in errors
    assert "Traceback" not in errors
    assert gmconv.load_checkpoint(output).labels == tuple("0123456789")
    assert f"go on with: gmconv train --resume {state}" in errors
    assert set(tmp_path.iterdir()) == {output, state}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_default_run_reaches_98_percent_on_digits(cli: Cli, tmp_path: Path, seed: int) -> None:
    arguments = ("--dataset", "digits", "--arch", "resnet20", "--seed", str(seed), "--json", "-q")
    done = cli("gmconv.train", *arguments, "-o", str(tmp_path / "c.pt"))
    assert json.loads(done.stdout)["held_out_accuracy"] >= 0.98


def test_help_does_not_wait_for_torch() -> None:
    check = "import sys, gmconv.train; sys.exit(bool({'torch', 'sklearn', 'PIL', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@pytest.mark.parametrize(
    ("values", "log", "again"),
    [
        ({}, None, ""),
        ({"dataset": "my photos", "arch": "nets:make"}, None, " --data 'my photos' --arch nets:make"),
        ({"device": "cuda", "arch": "timm:resnet18"}, Path("log.csv"), " --device cuda --log log.csv"),
    ],
)
def test_who_is_interrupted_reads_the_whole_command_that_goes_on(
    tmp_path: Path, values: dict[str, str], log: Path | None, again: str
) -> None:
    values = {"dataset": "digits", "arch": "resnet8", "device": "cpu", **values}
    state = tmp_path / "c.last.pt"
    state.touch()
    said = _goes_on(tmp_path / "c.pt", values, log, anew=True, before=None)
    assert said.endswith(f"go on with: gmconv train --resume {state}{again}")
    left = state.stat().st_mtime_ns  # by an earlier run
    assert "nothing was written" in _goes_on(tmp_path / "c.pt", values, log, anew=True, before=left)
    assert _goes_on(tmp_path / "c.pt", values, log, anew=False, before=left) == said


def test_what_an_interrupt_says_imports_nothing() -> None:
    """A Ctrl-C may fall into torch's own import, and importing it a second time ends the process."""
    said = (
        "import sys, pathlib, gmconv.train.__main__ as m; "
        "print(m._goes_on(pathlib.Path('gone/c.pt'), {}, None, anew=True, before=None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{said}; assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == " before an epoch finished; nothing was written\n"
