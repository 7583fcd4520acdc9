"""Training data: the digits' recipe, image folders, and the arithmetic shared with runtime."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gmconv import images
from gmconv.data import load_samples
from gmconv.errors import DataError, RefusedError
from gmconv.preprocessing import Preprocessing
from gmconv.train.data import FileSamples, batches, digits, image_folder, load_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten PNG images each, of odd sizes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(10):
            pixels = rng.integers(0, 256, (19 + index, 31 - index, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_digits_are_split_by_class_and_the_same_every_time() -> None:
    data, again = digits(), digits()
    assert len(data.train.targets) == 1437
    assert len(data.held_out.targets) == 360
    assert data.labels == tuple("0123456789")
    counts = np.bincount(data.held_out.targets)
    assert counts.min() >= 34
    assert counts.max() <= 37
    assert np.array_equal(data.held_out.targets, again.held_out.targets)
    assert not np.array_equal(digits(split_seed=1).held_out.targets, data.held_out.targets)
    assert data.record == {"name": "digits", "test_size": 0.2, "split_seed": 0}


def test_digits_are_enlarged_by_whole_factors() -> None:
    small, large = digits((1, 8, 8)).train.batch(np.arange(5)), digits((3, 16, 32)).train.batch(np.arange(5))
    assert large.shape == (5, 3, 16, 32)
    assert large.dtype == np.float32
    assert np.array_equal(large[:, :, ::2, ::4], np.repeat(small, 3, axis=1))
    assert np.array_equal(large[:, :, 1::2, 3::4], np.repeat(small, 3, axis=1))
    assert small.min() == 0.0
    assert small.max() == 1.0


def test_runtime_finds_the_same_held_out_digits() -> None:
    data = digits((3, 16, 16))
    samples = load_samples("digits", input_shape=(3, 16, 16), dataset=data.record)
    (batch,) = samples.batches(360)
    assert np.array_equal(batch.images, data.held_out.batch(np.arange(360)))
    assert np.array_equal(batch.labels, data.held_out.targets)


@pytest.mark.parametrize("shape", [(3, 30, 32), (3, 4, 8), (0, 8, 8)])
def test_digits_refuse_shapes_they_cannot_have(shape: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="multiples of 8"):
        digits(shape)


def test_a_folder_is_split_by_class(folder: Path) -> None:
    data = load_dataset(str(folder), (3, 16, 24))
    assert data.labels == ("cat", "dog")
    assert np.bincount(data.train.targets).tolist() == [8, 8]
    assert np.bincount(data.held_out.targets).tolist() == [2, 2]
    assert data.train.batch(np.array([0, 3])).shape == (2, 3, 16, 24)
    assert data.preprocessing is not None
    found = load_samples(
        folder, input_shape=(3, 16, 24), preprocessing=Preprocessing(**data.preprocessing), dataset=data.record
    )
    assert (found.part, len(found)) == ("held-out", 4)
    (batch,) = found.batches(4)
    np.testing.assert_array_equal(
        np.sort(batch.images.reshape(4, -1), 0), np.sort(data.held_out.batch(np.arange(4)).reshape(4, -1), 0)
    )


def test_a_folder_with_train_and_val_is_taken_as_split(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for index in range(2 if part == "val" else 3):
                shutil.copy(folder / name / f"{index}.png", root / part / name)
    data = image_folder(root, (1, 8, 8), 0.2, 0)
    assert (len(data.train.targets), len(data.held_out.targets)) == (6, 4)
    assert data.record is None, "the parts lie in folders of their own"
    assert data.train.batch(np.array([5])).shape == (1, 1, 8, 8)
    (root / "train" / "dog").rename(root / "train" / "\u00e9")
    (root / "val" / "dog").rename(root / "val" / "e\u0301")  # the same letter, as a Mac's archive has it
    assert image_folder(root, (1, 8, 8), 0.2, 0).labels == ("cat", "\u00e9")
    (root / "val" / "e\u0301").rename(root / "val" / "dog")
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(DataError, match="same classes"):
        image_folder(root, (1, 8, 8), 0.2, 0)


def test_bad_folders_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(str(tmp_path / "nowhere"), (3, 8, 8))
    with pytest.raises(DataError, match="two sub-folders"):
        load_dataset(str(folder / "cat"), (3, 8, 8))
    with pytest.raises(DataError, match="channels"):
        load_dataset(str(folder), (4, 8, 8))
    with pytest.raises(DataError, match=r"0\.png: is a file"):
        load_dataset(str(folder / "cat" / "0.png"), (3, 8, 8))
    (folder / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"empty: holds no images \(\.bmp, \.jpeg, \.jpg, \.pgm, \.png, \.ppm, \.webp\)$"
    ):
        load_dataset(str(folder), (3, 8, 8))
    for name in ("images", "masks"):
        shutil.copytree(folder / "cat", tmp_path / "pixels" / name)
    with pytest.raises(DataError, match="holds masks"):
        load_dataset(str(tmp_path / "pixels"), (3, 8, 8))


@pytest.mark.parametrize("link", ["cat/x.png", "wolf"])
def test_a_link_to_nothing_is_refused_by_name(folder: Path, link: str) -> None:
    (folder / link).symlink_to("/nowhere")
    with pytest.raises(RefusedError, match=rf"{link}: is a link to nothing \(/nowhere\)$"):
        image_folder(folder, (3, 8, 8), 0.2, 0)


def test_an_npz_of_arrays_is_split_by_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "own.npz", input=rng.random((40, 1, 8, 8), dtype=np.float32), labels=labels)
    data = load_dataset(str(tmp_path / "own.npz"), (1, 8, 8))
    assert data.labels == ("0", "1", "2", "3")
    assert (len(data.train.targets), len(data.held_out.targets)) == (32, 8)
    assert data.train.batch(np.arange(3)).shape == (3, 1, 8, 8)
    found = load_samples(tmp_path / "own.npz", input_shape=(1, 8, 8), dataset=data.record)
    assert sorted(found.labels if found.labels is not None else ()) == sorted(data.held_out.targets)
    np.savez(tmp_path / "own.npz", input=np.zeros((4, 1, 8, 8), np.float32))
    with pytest.raises(DataError, match="no labels"):
        load_dataset(str(tmp_path / "own.npz"), (1, 8, 8))


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "only.png")
    with pytest.raises(RefusedError, match="cannot be split"):
        load_dataset(str(tmp_path), (3, 8, 8))


def test_a_damaged_image_is_named(folder: Path) -> None:
    target = folder / "cat" / "0.png"
    target.write_bytes(target.read_bytes()[:200])
    preprocessing = Preprocessing(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    samples = FileSamples((folder / "cat" / "1.png", target), np.array([0, 0]), preprocessing)
    assert samples.batch(np.array([0])).shape == (1, 3, 8, 8)
    with pytest.raises(RefusedError, match=r"cat/0\.png: cannot be decoded"):
        samples.batch(np.array([0, 1]))


def test_preprocessing_of_a_saved_digit_gives_the_training_image(tmp_path: Path) -> None:
    """A digit stored as an 8x8 PNG and preprocessed is, to 8 bits, what was trained on."""
    data = digits((3, 32, 32))
    digit = digits((1, 8, 8)).held_out.batch(np.array([0]))[0, 0]
    Image.fromarray(np.round(digit * 255).astype(np.uint8)).save(tmp_path / "digit.png")
    assert data.preprocessing is not None
    image = images.load_image(tmp_path / "digit.png", Preprocessing(**data.preprocessing))
    np.testing.assert_allclose(image, data.held_out.batch(np.array([0]))[0], atol=0.51 / 255)


def test_preprocessing_fields_are_those_of_the_manifest(folder: Path) -> None:
    for data in (digits(), digits((1, 8, 8)), load_dataset(str(folder), (3, 8, 8))):
        assert data.preprocessing is not None
        Preprocessing(**data.preprocessing)
    assert digits((2, 8, 8)).preprocessing is None


@given(count=st.integers(1, 200), batch_size=st.integers(2, 64))
def test_batches_hold_each_index_once_and_never_one_alone(count: int, batch_size: int) -> None:
    plan = batches(count, batch_size)
    assert np.array_equal(np.concatenate(plan), np.arange(count))
    assert all(len(batch) > 1 for batch in plan) or count == 1
    assert all(len(batch) <= batch_size + 1 for batch in plan)
