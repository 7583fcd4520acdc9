"""A run that stopped goes on as if it had not: same weights, same history, bit for bit."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import gmconv
from gmconv.errors import CheckpointError
from gmconv.train.__main__ import main
from gmconv.train.loop import Epoch, train
from gmconv.train.options import TrainOptions, output_path, state_path
from gmconv.train.resume import read_state


class Stopped(Exception):  # noqa: N818
    """A power cut."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 images of two classes that take more than one epoch."""
    random, labels = np.random.default_rng(0), np.arange(160) % 2
    images = random.normal(size=(160, 1, 8, 8)) + 0.3 * labels[:, None, None, None]
    path = tmp_path_factory.mktemp("data") / "own.npz"
    np.savez(path, input=images.astype(np.float32), labels=labels)
    return path


def options(data: Path) -> TrainOptions:
    """Three epochs with augmentation, which draws numbers too."""
    shape = {"input_shape": (1, 8, 8), "batch_size": 40, "epochs": 3, "flip": True}
    return TrainOptions(arch="resnet8", dataset=str(data), **shape)  # type: ignore[arg-type]


def stopped(data: Path, output: Path, after: int) -> None:
    """Begin the run and stop it at once when `after` epochs are done."""

    def stop(epoch: Epoch | None) -> None:
        if epoch is not None and epoch.epoch == after:
            raise Stopped

    with pytest.raises(Stopped):
        train(options(data), output, stop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The checkpoint of the run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole") / "ckpt.pt"
    train(options(data), path)
    assert list(path.parent.iterdir()) == [path], "a run that is done leaves its checkpoint alone"
    return path


def test_the_whole_history_lies_beside_the_weights_of_the_best_epoch(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Epoch, "better_than", lambda self, other: self.epoch == 2)
    weights: list[dict[str, torch.Tensor]] = []

    def watch(epoch: Epoch | None) -> None:
        if epoch is not None and epoch.epoch == 2:
            weights.append(gmconv.load_checkpoint(tmp_path / "c.pt").model.state_dict())

    result = train(options(data), tmp_path / "c.pt", watch)
    done = gmconv.load_checkpoint(tmp_path / "c.pt")
    torch.testing.assert_close(done.model.state_dict(), weights[0], rtol=0, atol=0)
    torch.testing.assert_close(result.network.model.state_dict(), weights[0], rtol=0, atol=0)
    assert done.training is not None
    assert (done.training["best_epoch"], len(done.training["history"])) == (2, 3)


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, data: Path, whole: Path, after: int) -> None:
    output, log = tmp_path / "ckpt.pt", tmp_path / "log.csv"
    stopped(data, output, after)
    assert state_path(output).name == "ckpt.last.pt"
    done = CliRunner().invoke(main, ["--resume", str(state_path(output)), "--data", str(data), "--log", str(log), "-q"])
    assert done.exit_code == 0, done.output
    assert output.read_bytes() == whole.read_bytes()
    assert not state_path(output).exists()
    rows = list(csv.DictReader(log.open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert set(rows[0]) == {"epoch", "loss", "held_out_loss", "held_out_accuracy"}


def test_what_does_not_go_with_the_run_is_refused_in_one_sentence(tmp_path: Path, data: Path, whole: Path) -> None:
    output = tmp_path / "ckpt.pt"
    stopped(data, output, 1)
    state = str(state_path(output))
    with np.load(data) as arrays:
        np.savez(tmp_path / "other.npz", input=arrays["input"][:-2], labels=arrays["labels"][:-2])
    for arguments, code, words in (
        (["--resume", state], 3, "digits: is not the data that the run began with"),
        (["--resume", state, "--data", str(tmp_path / "other.npz")], 3, "is not the data"),
        (["--resume", state, "--data", str(data), "--lr", "0.1"], 2, "--lr: the run of"),
        (["--resume", state, "--data", str(data), "--plain"], 2, "--plain: the run of"),
        (["--resume", state, "-o", str(tmp_path / "other.pt")], 2, f"writes {output}: leave it out"),
        (["--resume", str(output), "--data", str(data)], 3, f"resume from {state}"),
        (["--resume", str(whole), "--data", str(data)], 3, "is no state of a training run"),
        (["--resume", str(tmp_path / "no.last.pt")], 3, "no such file"),
        (["--resume", str(tmp_path / "no.pt")], 3, "no such file: the state of a run is NAME.last.pt"),
    ):
        done = CliRunner().invoke(main, arguments)
        assert (done.exit_code, words in done.stderr) == (code, True), done.output
    output.unlink()
    done = CliRunner().invoke(main, ["--resume", state, "--data", str(data)])
    assert (done.exit_code, "the best epoch of the run is not there" in done.stderr) == (3, True)


OWN = """import pathlib
pathlib.Path("imported").touch()
import torch.nn as nn
def make(num_classes=2, in_channels=1):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))
other = make
"""


def test_a_state_does_not_choose_code_to_run(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_test_resume.py").write_text(OWN)
    arch, state = "nets_of_test_resume:make", tmp_path / "c.last.pt"

    def stop(epoch: Epoch | None) -> None:
        if epoch is not None:
            raise Stopped

    with pytest.raises(Stopped):
        train(replace(options(data), arch=arch), tmp_path / "c.pt", stop)
    (tmp_path / "imported").unlink()
    del sys.modules["nets_of_test_resume"]
    resume = ["--resume", str(state), "--data", str(data)]
    for arguments, code, words in (
        ([], 3, f"a file may not choose code to run: if you trust it, say --arch {arch}"),
        (
            ["--arch", "nets_of_test_resume:other"],
            2,
            f"--arch: the run of {state} has {arch}, and goes on with it: say",
        ),
        (["--arch", "resnet8"], 2, f"say --arch {arch}"),
    ):
        done = CliRunner().invoke(main, [*resume, *arguments])
        assert (done.exit_code, words in done.stderr) == (code, True), done.output
        assert not (tmp_path / "imported").exists()
    raw = torch.load(state)
    torch.save(raw | {"options": raw["options"] | {"arch": 7}}, state)
    assert CliRunner().invoke(main, resume).exit_code == 3
    torch.save(raw, state)
    done = CliRunner().invoke(main, [*resume, "--arch", arch])
    assert (done.exit_code, (tmp_path / "imported").exists()) == (0, True), done.output


def test_a_checkpoint_is_no_state_and_a_state_no_checkpoint(tmp_path: Path, data: Path, whole: Path) -> None:
    (tmp_path / "ckpt.last.pt").write_bytes(whole.read_bytes())
    with pytest.raises(CheckpointError, match="is no state of a training run"):
        read_state(tmp_path / "ckpt.last.pt")
    (tmp_path / "ckpt.last.pt").unlink()
    stopped(data, tmp_path / "ckpt.pt", 1)
    with pytest.raises(CheckpointError, match="is the state of a training run, for gmconv train --resume"):
        gmconv.load_checkpoint(tmp_path / "ckpt.last.pt")
    assert output_path(tmp_path / "ckpt.last.pt") == tmp_path / "ckpt.pt"
    assert str(data).encode() not in (tmp_path / "ckpt.last.pt").read_bytes()
