"""`gmconv.foreign`: the options that every command with checkpoints shares, as one object."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import gmconv
from gmconv.cli import Command
from gmconv.errors import RefusedError
from gmconv.foreign import (
    OTHERWISE,
    Foreign,
    foreign_options,
    preprocessing_of,
    read_labels,
    read_preprocessing_file,
    refuse_labels,
    sizing,
)
from gmconv.preprocessing import read_preprocessing


def collected(*arguments: str) -> Foreign:
    found: list[Foreign] = []

    @click.command(cls=Command)
    @foreign_options
    def command(foreign: Foreign) -> None:
        found.append(foreign)

    done = CliRunner().invoke(command, list(arguments))
    assert done.exit_code == 0, done.output
    return found[0]


@pytest.mark.parametrize(
    "command",
    ["export.onnx.__main__", "export.tensorrt.command", "runtime.parity.__main__", "runtime.benchmark.__main__",
     "runtime.evaluate.__main__"],
)  # fmt: skip
def test_no_option_of_a_command_takes_the_place_of_another(command: str) -> None:
    params = importlib.import_module(command).main.params
    names, flags = [p.name for p in params], [flag for p in params for flag in p.opts]
    assert len(set(names)) == len(names)
    assert len(set(flags)) == len(flags)


def test_nothing_said_is_nothing_given() -> None:
    assert collected().given() == {}


def test_everything_said_arrives_in_one_object(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "p.json").write_text(json.dumps({"interpolation": "bicubic", "mean": [0, 0, 0]}))
    text = (
        f"--arch my.nets:make --num-classes 2 --input-shape 3x32x48 --mean 0.5,0.5,0.4 --labels {tmp_path}/labels.txt"
        " --weights ema.module"
    )
    found = collected(*text.split(), "--preprocessing", str(tmp_path / "p.json"))
    assert found.given() == {
        "arch": "my.nets:make",
        "num_classes": 2,
        "input_shape": (3, 32, 48),
        "preprocessing": {"interpolation": "bicubic", "mean": (0.5, 0.5, 0.4)},
        "labels": ("cat", "dog"),
        "weights": "ema.module",
    }


@pytest.mark.parametrize(
    "arguments", [["--input-shape", "3,x,4"], ["--input-shape", "3,4"], ["--mean", "a"], ["--num-classes", "0"]]
)
def test_nonsense_is_a_usage_error(arguments: list[str]) -> None:
    @click.command(cls=Command)
    @foreign_options
    def command(foreign: Foreign) -> None: ...

    assert CliRunner().invoke(command, arguments).exit_code == 2


@pytest.mark.parametrize("text", ["", "\n\n", "cat\n\ndog", "[1, 2]", "[", "\x1b[2J"])
def test_labels_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(RefusedError, match="labels"):
        read_labels(tmp_path / "labels")


def test_a_folder_is_no_file_of_labels(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is a directory; give a file"):
        read_labels(tmp_path)


def test_preprocessing_may_come_from_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"schema": "x", "preprocessing": {"scale": 1}}))
    assert read_preprocessing_file(tmp_path / "m.json") == {"scale": 1}
    for text in ("[]", "{", "\xff"):
        (tmp_path / "m.json").write_text(text, encoding="latin-1")
        with pytest.raises(RefusedError, match=r"m\.json"):
            read_preprocessing_file(tmp_path / "m.json")


def test_a_foreign_checkpoint_gets_what_it_does_not_say(tmp_path: Path) -> None:
    import torch

    torch.save(gmconv.models.create("resnet20", gmconv=False).state_dict(), tmp_path / "net.pth")
    said: dict[str, Any] = {"preprocessing": {"mean": (0.5,) * 3, "std": (0.25,) * 3}, "labels": tuple("0123456789")}
    foreign = Foreign(arch="resnet20", input_shape=(3, 16, 24), **said)
    loaded = gmconv.load_checkpoint(tmp_path / "net.pth", **foreign.given())
    preprocessing = read_preprocessing(loaded.preprocessing)
    assert preprocessing is not None
    assert (preprocessing.size, preprocessing.mean, preprocessing.std) == ((16, 24), (0.5,) * 3, (0.25,) * 3)
    assert loaded.labels == tuple("0123456789")


def test_what_a_checkpoint_says_of_its_images_is_kept_but_for_what_is_told(tmp_path: Path) -> None:
    own = {"size": [20, 24], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    own |= {"resize": "shortest-then-crop", "crop_ratio": 0.875}
    model = gmconv.models.create("resnet8", gmconv=False)
    path = tmp_path / "net.pt"
    gmconv.save_checkpoint(path, model, "gmconv.models:resnet8", (3, 16, 24), preprocessing=own)
    (tmp_path / "p.json").write_text('{"mean": [0, 0, 0]}')
    for told in ({"mean": (0.0,) * 3}, tmp_path / "p.json"):
        found = gmconv.load_checkpoint(path, preprocessing=told)
        assert read_preprocessing(found.preprocessing) == read_preprocessing({**own, "mean": [0.0] * 3})
        assert found.warnings == (f"{OTHERWISE}mean 0, 0, 0 (not 0.5, 0.5, 0.5)",)
    assert not gmconv.load_checkpoint(path, preprocessing={"mean": [0.5] * 3, "std": (0.25,) * 3}).warnings
    found = gmconv.load_checkpoint(path)
    assert (found.preprocessing, found.warnings) == (own, ())
    found = gmconv.load_checkpoint(path, input_shape=(3, 32, 32), preprocessing={"scale": 1 / 255})
    assert read_preprocessing(found.preprocessing) == read_preprocessing({**own, "size": [32, 32]})
    gmconv.save_checkpoint(path, model, "gmconv.models:resnet8", (3, 16, 24), preprocessing={"mean": 7})
    found = gmconv.load_checkpoint(path, preprocessing={"mean": (0.5,) * 3, "std": (1.0,) * 3})
    assert (found.preprocessing["size"], found.warnings) == ((16, 24), ()), "what is damaged is replaced"
    pixels = {"size": [16, 24], "mean": [127.0] * 3, "std": [60.0] * 3, "scale": 1.0}
    gmconv.save_checkpoint(path, model, "gmconv.models:resnet8", (3, 16, 24), preprocessing=pixels)
    with pytest.raises(RefusedError, match="the checkpoint's scale is 1, and that of 0..1 is 1/255: give a scale too"):
        gmconv.load_checkpoint(path, preprocessing={"mean": (0.5,) * 3, "std": (0.25,) * 3})
    told = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "scale": 1 / 255}
    found = gmconv.load_checkpoint(path, preprocessing=told)
    assert read_preprocessing(found.preprocessing) == read_preprocessing({"size": [16, 24], **told})
    assert preprocessing_of({"mean": (), "std": ()}, (3, 16, 16))["mean"] == (), "whoever has the images refuses that"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "has a mean and no std; give both"),
        ({"std": (0.5, 0.5, 0.5)}, "has a std and no mean; give both"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58, 57, 57)}, "mean is one of pixels in 0..255"),
        ({"resize": "foo"}, "'foo' - at resize; it is one of stretch, shortest-then-crop"),
        ({"size": "big"}, "at size; mean and std take one number for each channel"),
    ],
)
def test_preprocessing_that_is_half_said_or_unknown_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        preprocessing_of(given, (3, 16, 16))


def test_how_photos_come_to_their_size_is_said_where_nobody_said_it() -> None:
    """Stretched or cropped is worth ten points of accuracy, and both sides of a comparison read the same photos."""
    given: dict[str, Any] = {"mean": (0.5,), "std": (0.5,)}
    (note,) = sizing(given, preprocessing_of(given, (1, 8, 6)))
    assert note.startswith("photos are stretched to 8 x 6 (height x width), as nothing says otherwise")
    said = {**given, "resize": "shortest-then-crop"}
    assert sizing(said, preprocessing_of(said, (1, 8, 6))) == sizing(None, None) == ()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Foreign(labels=("a", "b"), labels_file=Path("names.txt")), "^names.txt: 2 names for the network's 3 classes"),
        (Foreign(labels=("a", "b")), "^labels: 2 names"),
        (Foreign(), "^the checkpoint's labels: 2 names"),
    ],
)
def test_labels_of_another_number_than_the_classes_are_refused(given: Foreign, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        refuse_labels(("a", "b"), [("batch", 4, 8, 8), ("batch", 3)], given)
    refuse_labels(("a", "b"), [("batch", 2)], given)
    refuse_labels(("a", "b"), [("batch", 4, 8, 8)], given)
    refuse_labels(None, [("batch", 3)], given)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "tokens:int64:12"], r"'tokens:int64:12' is not NAME:SHAPE\[:DTYPE\], .* int8, uint8, bool\n"),
        (["--input", "x:12:int65"], "'int65' is none of float32, .*, bool\n"),
        (["--input", "x:12", "--input", "x:13"], "'x' is given twice"),
        (["--input-shape", "1,512"], "is told as --input NAME:SHAPE, such as x:1,512\n"),
        (["--input-shape", "1,\x1b[2J"], r"'1,\\+x1b\[2J' is not C,H,W"),
    ],
)
def test_what_an_input_is_told_as_is_said_to_the_end(arguments: list[str], words: str) -> None:
    @click.command(cls=Command)
    @foreign_options
    def command(foreign: Foreign) -> None: ...

    found = CliRunner().invoke(command, arguments)
    assert found.exit_code == 2
    assert re.search(words, found.output)
