"""A run replaces what such a run wrote; files of others, other networks and runs that may go on stay."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import gmconv
from gmconv.errors import RefusedError
from gmconv.train.__main__ import main
from gmconv.train.loop import Epoch, TrainingError, train
from gmconv.train.options import TrainOptions

TINY = TrainOptions(arch="resnet8", epochs=2, input_shape=(1, 8, 8), batch_size=512)
ARGUMENTS = ["--arch", "resnet8", "--epochs", "1", "--input-shape", "1,8,8", "--batch-size", "512", "-q"]


class Stopped(Exception):  # noqa: N818
    """A power cut."""


def stop(epoch: Epoch | None) -> None:
    """After the first epoch."""
    if epoch is not None:
        raise Stopped


def foreign(path: Path, kind: str) -> None:
    """A file that no training here wrote."""
    model = gmconv.models.resnet8(gmconv=False)
    if kind == "state_dict":
        torch.save(model.state_dict(), path)
    elif kind == "saved":
        gmconv.save_checkpoint(path, model, "gmconv.models:resnet8", (3, 32, 32), {"gmconv": False})
    else:
        path.write_text("notes")


@pytest.mark.parametrize("kind", ["state_dict", "saved", "text"])
@pytest.mark.parametrize("name", ["ckpt.pt", "user.pth"])
def test_a_file_that_training_did_not_write_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign(Path(name), kind)
    was = Path(name).read_bytes()
    named = ["-o", name] if name != "ckpt.pt" else []
    data = ["--data", "nowhere"]  # refused before data is looked for
    done = CliRunner().invoke(main, [*ARGUMENTS, *named, *data])
    assert (done.exit_code, done.stdout) == (3, "")
    assert f"{name}: is there, and is no checkpoint that gmconv train wrote: give " in done.stderr
    with pytest.raises(RefusedError, match="--force"):
        train(TINY, Path(name))
    assert (Path(name).read_bytes(), [path.name for path in tmp_path.iterdir()]) == (was, [name])
    assert CliRunner().invoke(main, [*ARGUMENTS, *named, "--force"]).exit_code == 0
    assert gmconv.load_checkpoint(name).training


def test_a_network_of_another_kind_is_replaced_by_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, code in ((ARGUMENTS, 0), ([*ARGUMENTS, "--seed", "2"], 0), (["--arch", "resnet20"], 3)):
        assert CliRunner().invoke(main, arguments).exit_code == code
    was = Path("ckpt.pt").read_bytes()
    done = CliRunner().invoke(main, ["--arch", "resnet8", "--data", "photos"])
    assert done.stderr == (
        "Error: ckpt.pt: is gmconv.models:resnet8 trained on digits, and this would be gmconv.models:resnet8 trained "
        "on photos: give a name with -o, or --force to replace it\n"
    )
    assert Path("ckpt.pt").read_bytes() == was
    done = CliRunner().invoke(main, ["-o", "ckpt.pt", *ARGUMENTS, "--arch", "resnet20"])
    assert done.exit_code == 0, done.stderr
    assert gmconv.load_checkpoint("ckpt.pt").arch == "gmconv.models:resnet20"


def test_a_run_that_was_stopped_is_not_begun_again_by_accident(tmp_path: Path) -> None:
    output, state = tmp_path / "k.pt", tmp_path / "k.last.pt"
    with pytest.raises(Stopped):
        train(TINY, output, stop)
    was = output.read_bytes(), state.read_bytes()
    done = CliRunner().invoke(main, [*ARGUMENTS, "-o", str(output)])
    assert done.exit_code == 3
    assert f"{state}: a run that was stopped after epoch 1 is there: go on with --resume {state}, or" in done.stderr
    with pytest.raises(TrainingError):
        train(dataclasses.replace(TINY, lr=1e30), output, force=True)
    assert (output.read_bytes(), state.read_bytes()) == was, "what did not get through an epoch replaces nothing"
    done = CliRunner().invoke(main, ["--resume", str(state), "--force"])
    assert (done.exit_code, "leave one out" in done.stderr) == (2, True)
    assert CliRunner().invoke(main, [*ARGUMENTS, "-o", str(output), "--force"]).exit_code == 0
    assert list(tmp_path.iterdir()) == [output]
    state.write_text("notes")
    done = CliRunner().invoke(main, [*ARGUMENTS, "-o", str(output)])
    assert (done.exit_code, "is where a run keeps its state" in done.stderr) == (3, True)


def test_a_run_goes_on_from_its_own_best_epoch_alone(tmp_path: Path) -> None:
    output, state = tmp_path / "k.pt", tmp_path / "k.last.pt"
    with pytest.raises(Stopped):
        train(TINY, output, stop)
    foreign(output, "state_dict")
    was = output.read_bytes()
    done = CliRunner().invoke(main, ["--resume", str(state)])
    assert (done.exit_code, "put it back, or train anew" in done.stderr) == (3, True)
    assert output.read_bytes() == was
