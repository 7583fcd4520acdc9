"""Where samples come from, how they are drawn, and that memory is bounded by one batch."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gmconv.data import load_samples
from gmconv.errors import RefusedError
from gmconv.images import Preprocessing

SHAPE = (3, 8, 8)
PLAIN = Preprocessing(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)


def stack(samples: Any) -> Any:
    return np.concatenate([batch.images for batch in samples])


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes, `cat` with two images and `dog` with three; every image has its own grey."""
    for name, greys in (("dog", (60, 70, 80)), ("cat", (10, 20))):
        (tmp_path / name).mkdir()
        for grey in greys:
            Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / name / f"{grey}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_noise_is_seeded_and_independent_of_the_batch_size() -> None:
    a = load_samples("noise", input_shape=SHAPE, limit=10, seed=3)
    assert [len(batch.images) for batch in a.batches(4)] == [4, 4, 2]
    assert next(iter(a)).labels is None
    np.testing.assert_array_equal(stack(a), np.concatenate([batch.images for batch in a.batches(7)]))
    assert not np.array_equal(stack(a), stack(load_samples("noise", input_shape=SHAPE, limit=10, seed=4)))
    np.testing.assert_array_equal(stack(a), stack(a))


def test_digits_are_the_held_out_ones_of_the_manifests_split() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    _, held_out = train_test_split(np.arange(1797), test_size=0.2, random_state=5, stratify=raw.target)
    found = load_samples("digits", input_shape=(3, 16, 16), dataset={"test_size": 0.2, "split_seed": 5})
    assert len(found) == 360
    np.testing.assert_array_equal(found.labels, raw.target[held_out])
    want = np.kron(raw.images[held_out[0]] / 16, np.ones((2, 2)))
    np.testing.assert_array_equal(next(iter(found)).images[0], np.stack([want] * 3).astype(np.float32))
    assert len(load_samples("digits", input_shape=(1, 8, 8), part="all")) == 1797


def test_the_training_part_of_the_digits_is_the_rest() -> None:
    train = stack(load_samples("digits", input_shape=(1, 8, 8), part="train"))
    held_out = stack(load_samples("digits", input_shape=(1, 8, 8)))
    assert len(train) == 1797 - len(held_out)
    every = stack(load_samples("digits", input_shape=(1, 8, 8), part="all"))
    np.testing.assert_array_equal(
        np.sort(np.concatenate([train, held_out]).reshape(1797, -1), axis=0), np.sort(every.reshape(1797, -1), axis=0)
    )


def test_a_limit_draws_without_repetition_by_seed_and_keeps_labels_in_step() -> None:
    whole = load_samples("digits", input_shape=(1, 8, 8))
    some = load_samples("digits", input_shape=(1, 8, 8), limit=50, seed=1)
    assert some.labels is not None
    assert whole.labels is not None
    images = {image.tobytes(): label for image, label in zip(stack(whole), whole.labels, strict=True)}
    drawn = stack(some)
    assert len({image.tobytes() for image in drawn}) == 50
    assert [images[image.tobytes()] for image in drawn] == some.labels.tolist()
    other = load_samples("digits", input_shape=(1, 8, 8), limit=50, seed=2)
    assert not np.array_equal(stack(other), drawn)


@pytest.mark.parametrize("shape", [(3, 9, 8), (3, 30, 30)])
def test_digits_need_whole_factors(shape: tuple[int, int, int]) -> None:
    with pytest.raises(RefusedError, match="whole factors"):
        load_samples("digits", input_shape=shape)


def test_sub_folders_are_classes_in_alphabetical_order(classes: Path) -> None:
    found = load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN)
    assert found.classes == ("cat", "dog")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_allclose(stack(found)[:, 0, 0, 0] * 255, [10, 20, 60, 70, 80], rtol=1e-5)
    assert [batch.labels.tolist() for batch in found.batches(2) if batch.labels is not None] == [[0, 0], [1, 1], [1]]


def test_sub_folders_follow_the_networks_labels_by_name(classes: Path) -> None:
    found = load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN, class_names=("dog", "fox", "cat"))
    assert found.labels is not None
    assert found.labels.tolist() == [2, 2, 0, 0, 0]
    with pytest.raises(RefusedError, match="cat, dog are not among"):
        load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN, class_names=("a", "b", "c"))


def test_a_flat_folder_has_no_labels(classes: Path) -> None:
    found = load_samples(classes / "dog", input_shape=SHAPE, preprocessing=PLAIN)
    assert found.labels is None
    assert len(found) == 3


def test_a_folder_split_in_train_and_val_gives_val(classes: Path) -> None:
    (classes / "cat").rename(classes / "train")
    (classes / "dog").rename(classes / "val")
    assert len(load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN)) == 3


def test_npz_files_with_and_without_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((7, *SHAPE), dtype=np.float32)
    np.savez(tmp_path / "a.npz", input=images, labels=np.arange(7))
    np.savez_compressed(tmp_path / "b.npz", anything=images)
    a = load_samples(tmp_path / "a.npz", input_shape=SHAPE, limit=3, seed=0)
    assert a.labels is not None
    np.testing.assert_array_equal(stack(a), images[a.labels])
    np.testing.assert_array_equal(stack(load_samples(tmp_path / "b.npz", input_shape=SHAPE)), images)


def test_npz_is_read_in_batches(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input=np.zeros((2000, 3, 32, 32), np.float32))  # 24 MB
    samples = load_samples(tmp_path / "a.npz", input_shape=(3, 32, 32))
    tracemalloc.start()
    assert sum(len(batch.images) for batch in samples.batches(8)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"input": np.zeros((2, 3, 8, 8))}, "float64"),
        ({"input": np.zeros((2, 3, 8, 9), np.float32)}, "the network takes float32"),
        ({"input": np.zeros((0, 3, 8, 8), np.float32)}, "no samples"),
        ({"a": np.zeros(1), "b": np.zeros(1)}, "name the images' array 'input'"),
        ({"input": np.zeros((2, 3, 8, 8), np.float32), "labels": np.zeros(3, int)}, "one integer per image"),
        ({"input": np.array([{}])}, "plain numbers"),
        ({}, "holds nothing"),
    ],
)
def test_npz_files_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(RefusedError, match=words):
        load_samples(tmp_path / "a.npz", input_shape=SHAPE)


def test_truncated_and_foreign_npz_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, input=np.zeros((4, *SHAPE), np.float32))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(RefusedError, match="not a readable"):
            load_samples(path, input_shape=SHAPE)


def test_sources_that_give_nothing_are_refused(tmp_path: Path) -> None:
    for spec, words in (
        (tmp_path, "holds no samples"),
        (tmp_path / "none", "no such data"),
        ("imagenet", "no such data"),
    ):
        with pytest.raises(RefusedError, match=words):
            load_samples(spec, input_shape=SHAPE, preprocessing=PLAIN)
    with pytest.raises(RefusedError, match="no preprocessing"):
        load_samples(tmp_path, input_shape=SHAPE)
    with pytest.raises(RefusedError, match=r"makes \(3, 8, 8\) images"):
        load_samples(tmp_path, input_shape=(1, 8, 8), preprocessing=PLAIN)
    with pytest.raises(RefusedError, match="at least 1"):
        load_samples("noise", input_shape=SHAPE, limit=0)


def test_a_damaged_image_in_a_folder_is_refused_by_name(classes: Path) -> None:
    (classes / "cat" / "10.png").write_bytes(b"broken")
    with pytest.raises(RefusedError, match=r"cat/10\.png"):
        stack(load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN))
