"""Each artefact is judged on images prepared as it is served, or the command says why it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import gmconv
from gmconv.errors import RefusedError
from gmconv.foreign import OTHERWISE
from runtime.evaluate.__main__ import main
from runtime.evaluate.score import EvaluateOptions, evaluate
from runtime.manifest import Manifest, TensorSpec, digest, sidecar
from tests.runtime.evaluate.test_evaluate import CLASSES, save, save_pixels

RIGHT = {"size": [2, 4], "mean": [0.0], "std": [1.0], "channel_order": "L"}
INVERTED = RIGHT | {"std": [-1.0]}


def served(path: Path, preprocessing: dict[str, Any]) -> Path:
    """`path`, whose manifest says that its images are prepared like this."""
    manifest = json.loads(sidecar(path).read_text())
    sidecar(path).write_text(json.dumps(manifest | {"preprocessing": preprocessing}))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two images for each class, whose pixel is the brightest; none twice."""
    random = np.random.default_rng(0)
    for index in range(CLASSES):
        (tmp_path / "photos" / str(index)).mkdir(parents=True)
        for number in range(2):
            pixels = random.integers(0, 200, CLASSES, dtype=np.uint8)
            pixels[index] = 255
            Image.fromarray(pixels.reshape(2, 4)).save(tmp_path / "photos" / str(index) / f"{number}.png")
    return tmp_path / "photos"


def test_each_artefact_sees_images_as_it_is_served(tmp_path: Path, photos: Path) -> None:
    good, bad = served(save(tmp_path / "a.onnx"), RIGHT), served(save(tmp_path / "b.onnx"), INVERTED)
    again, silent = served(save(tmp_path / "c.onnx"), INVERTED), save(tmp_path / "d.onnx")
    for artefacts in ([good, bad, again, silent], [bad, again, good], [again, bad, good]):
        done = evaluate(artefacts, EvaluateOptions(images=photos, batch=3))
        found = {row.artefact: row.score.top1.hits for row in done.rows}
        assert (found["a.onnx"], found["b.onnx"], found["c.onnx"]) == (16, 0, 0)
        assert found.get("d.onnx", 16) == 16, "one that says nothing is prepared for as the reference"
        told = {text.partition(" ")[0] for text in done.warnings if "other preprocessing" in text}
        assert told == {path.name for path in artefacts if path != silent and (path == good) != (artefacts[0] == good)}
    arguments = [str(good), str(bad), "--data", str(photos), "--max-drop", "1"]
    failed = CliRunner().invoke(main, arguments)
    assert failed.exit_code == 4
    assert "b.onnx: top-1 is 100.00 points below a.onnx" in failed.stderr
    assert "b.onnx is served with other preprocessing than a.onnx: std -1 (not 1); each was judged" in failed.stderr
    done = evaluate([good, served(save(tmp_path / "e.onnx"), RIGHT | {"crop_ratio": 0.5})], images=photos)
    assert not any("other preprocessing" in text for text in done.warnings), "what stretches does not crop"


def test_a_checkpoint_that_is_told_otherwise_is_named(tmp_path: Path, photos: Path) -> None:
    facts: Any = {"preprocessing": {"size": (8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}}
    facts["labels"] = [*map(str, range(CLASSES)), "without images", "nor has this one any"]
    model = gmconv.models.create("resnet8", gmconv=False)
    gmconv.save_checkpoint(tmp_path / "net.pt", model, "gmconv.models:resnet8", (3, 8, 8), **facts)
    said = f"{OTHERWISE}mean 0.5, 0.5, 0.5 (not 0, 0, 0)"
    assert evaluate(tmp_path / "net.pt", images=photos, mean=(0.5,) * 3).warnings[0] == said
    assert not any(OTHERWISE in text for text in evaluate(tmp_path / "net.pt", images=photos).warnings)


def test_inputs_that_are_prepared_already_are_right_for_one_preprocessing(tmp_path: Path) -> None:
    good, bad = served(save(tmp_path / "a.onnx"), RIGHT), served(save(tmp_path / "b.onnx"), INVERTED)
    images = np.random.default_rng(0).random((8, 1, 2, 4), dtype=np.float32)
    np.savez(tmp_path / "ready.npz", input=images, labels=np.arange(8))
    ready = EvaluateOptions(images=tmp_path / "ready.npz")
    with pytest.raises(RefusedError, match=r"b\.onnx is served with other .* than a\.onnx: std -1 \(not 1\); .*ready"):
        evaluate([good, bad], ready)
    assert not evaluate([bad], ready).warnings
    assert not evaluate([good, save(tmp_path / "c.onnx")], ready).warnings, "one that says nothing is as the reference"


def test_masks_are_of_one_cut(tmp_path: Path) -> None:
    usual = {"size": [8, 8], "mean": [0.0], "std": [1.0], "channel_order": "L"}
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "data" / name / "0.png")
    paths = [save_pixels(tmp_path / f"{name}.onnx") for name in "abc"]
    ways = ({}, {"std": [2.0]}, {"resize": "shortest-then-crop", "crop_ratio": 0.5})
    for path, own in zip(paths, ways, strict=True):
        image, mean, found = (("n", 1, 8, 8), ("n", 1), ("n", 2, 4, 4))
        outputs = TensorSpec("mean", "float32", mean), TensorSpec("map", "float32", found)
        inputs = (TensorSpec("input", "float32", image),)
        sidecar(path).write_text(Manifest(artefact=digest(path, "onnx"), inputs=inputs, outputs=outputs).to_json())
        served(path, usual | own)
    options = EvaluateOptions(images=tmp_path / "data", output="map")
    assert "std 2 (not 1)" in evaluate(paths[:2], options).warnings[0]
    with pytest.raises(RefusedError, match=r"c\.onnx is served .* than a\.onnx: resize .*; masks are cut as their im"):
        evaluate([paths[0], paths[2]], options)


def test_artefacts_that_name_the_classes_otherwise_share_no_folders(tmp_path: Path, photos: Path) -> None:
    """Which class a folder is follows from the names: judged by another's, a network that serves wrong ones passes."""
    names = tuple(map(str, range(CLASSES)))
    good, same = (served(save(tmp_path / f"{n}.onnx", labels=names), RIGHT) for n in "ab")
    silent = served(save(tmp_path / "c.onnx"), RIGHT)
    other = served(save(tmp_path / "d.onnx", labels=(*names[:2], *names[:1:-1])), RIGHT)
    assert [row.score.lost for row in evaluate([good, same, silent], EvaluateOptions(images=photos)).rows] == [0, 0, 0]
    assert evaluate(other, EvaluateOptions(images=photos)).rows[0].score.top1.hits < 16
    for artefacts, words in (
        ([good, other], "d.onnx calls class 2 '7', and a.onnx '2': "),
        ([other, silent, good], "a.onnx"),
    ):
        with pytest.raises(RefusedError, match=words):
            evaluate(artefacts, EvaluateOptions(images=photos, compared=True))
