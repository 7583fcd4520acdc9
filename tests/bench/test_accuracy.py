"""The accuracy bench: pairs, intervals, subsets, what is used again, and that it runs on real files."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.bench import accuracy
from tests.bench.accuracy import Settings, difference, measure, quantized, subset


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of noise, one darker: 12 and 4 files of each."""
    for part, count in (("train", 12), ("test", 4)):
        for label, shade in (("dark", 60), ("light", 190)):
            folder = tmp_path / "photographs" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(number).normal(shade, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return tmp_path / "photographs"


def test_the_interval_is_students_over_the_pairs() -> None:
    found = difference([90.0, 92.0, 94.0], [89.0, 90.0, 94.0])
    assert found.mean == pytest.approx(1.0)
    # Standard deviation 1, three pairs: t(0.975, 2) / sqrt(3) = 4.3027 / 1.7321.
    assert (found.low, found.high) == pytest.approx((1 - 2.4841, 1 + 2.4841), abs=1e-3)
    assert str(found) == "+1.00 points, 95 % interval [-1.48, +3.48]"


def test_one_seed_has_a_difference_and_no_interval() -> None:
    found = difference([90.0], [89.0])
    assert (found.mean, found.low, found.high) == (1.0, -math.inf, math.inf)
    assert "no interval" in str(found)


def test_a_subset_has_as_many_images_of_each_class_and_is_the_same_every_time(images: Path, tmp_path: Path) -> None:
    counts = {"train": 10, "test": None}
    first, second = (subset(images, tmp_path / name, counts) for name in ("a", "b"))
    names = sorted(str(file.relative_to(first)) for file in first.rglob("*.png"))
    assert names == sorted(str(file.relative_to(second)) for file in second.rglob("*.png"))
    assert [sum(name.startswith(part) for name in names) for part in ("train/dark", "train/light", "test")] == [5, 5, 8]
    fewer = subset(images, tmp_path / "a", {"train": 4, "test": None})
    kept = {str(file.relative_to(fewer)) for file in fewer.rglob("*.png")}
    assert len(kept) == 4 + 8, "what an earlier run with another count had is gone"
    assert kept < set(names)
    assert subset(images, tmp_path / "c", {"train": None, "test": None}) == images


def test_an_interrupted_run_is_resumed_and_another_setting_is_not_mixed_in(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(images=images, folder=tmp_path / "kept", epochs=1, seeds=2, size=16, batch_size=8)
    lines, found = measure(settings)
    assert "24 training and 8 held-out photographs" in lines[0]
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == ["seed", "1", "2"]
    assert math.isfinite(found.low)
    trained: list[str] = []
    monkeypatch.setattr("gmconv.train.loop.train", lambda options, path, force: trained.append(path.name) or 1 / 0)
    assert measure(settings) == (lines, found), "nothing is trained again"
    (tmp_path / "kept" / "resnet20-plain-2.json").unlink()
    for changed in (settings, dataclasses.replace(settings, epochs=2)):
        with pytest.raises(ZeroDivisionError):
            measure(changed)
    assert trained == ["resnet20-plain-2.pt", "resnet20-gmconv-1.pt"]


def test_the_precisions_are_those_of_the_same_checkpoint(
    digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (digits_checkpoint, digits_onnx, digits_onnx.with_name(digits_onnx.name + ".json")):
        shutil.copyfile(file, tmp_path / file.name)
    monkeypatch.setattr(accuracy, "CALIBRATION_IMAGES", 16)
    settings = Settings(images=tmp_path, folder=tmp_path, precisions=("int8",))
    rows = quantized(settings, "digits", tmp_path / digits_checkpoint.name)
    assert [row["precision"] for row in rows] == ["fp32", "int8"]
    assert rows[0]["agreement"]["value"] == 1.0
    assert 0.9 < rows[1]["agreement"]["value"] <= 1.0
    assert quantized(settings, "digits", tmp_path / digits_checkpoint.name) == rows
