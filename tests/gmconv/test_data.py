"""Where samples come from, how they are drawn, and that memory is bounded by one batch."""

import shutil
import tracemalloc
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gmconv.data import array_entries, file_entries, load_samples, refuse_missing
from gmconv.errors import RefusedError
from gmconv.preprocessing import Preprocessing
from gmconv.splits import split_record

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


def test_digits_are_prepared_as_images_are(tmp_path: Path) -> None:
    plain, shape = replace(PLAIN, size=(16, 16)), (3, 16, 16)
    bare = stack(load_samples("digits", input_shape=shape, limit=4))
    np.testing.assert_array_equal(stack(load_samples("digits", input_shape=shape, limit=4, preprocessing=plain)), bare)
    own = replace(plain, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    mean, std = (np.reshape(np.float32(values), (3, 1, 1)) for values in (own.mean, own.std))
    found = stack(load_samples("digits", input_shape=shape, limit=4, preprocessing=own))
    np.testing.assert_array_equal(found, (bare - mean) / std)
    for ratio, same in ((1.0, True), (0.5, False)):
        cut = replace(plain, resize="shortest-then-crop", crop_ratio=ratio)
        found = stack(load_samples("digits", input_shape=shape, limit=4, preprocessing=cut))
        assert np.array_equal(found, bare) == same
    with pytest.raises(RefusedError, match="1 means and 1 deviations for 3 channels"):
        stack(load_samples("digits", input_shape=shape, preprocessing=replace(plain, mean=(0.0,), std=(1.0,))))


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
        load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN, class_names=("a", "b", "c")).judged()


def test_a_flat_folder_has_no_labels(classes: Path) -> None:
    found = load_samples(classes / "dog", input_shape=SHAPE, preprocessing=PLAIN)
    assert found.labels is None
    assert len(found) == 3


def test_a_folder_split_in_train_and_val_gives_val(classes: Path) -> None:
    (classes / "cat").rename(classes / "train")
    (classes / "dog").rename(classes / "val")
    assert len(load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN)) == 3


def test_train_and_val_are_classes_of_one_name_each_and_all_is_both(classes: Path, tmp_path: Path) -> None:
    for part, names in (("train", ("cat", "dog")), ("val", ("dog",))):
        for name in names:
            shutil.copytree(classes / name, tmp_path / "root" / part / name)
    counts = {}
    for part in ("held-out", "train", "all"):
        found = load_samples(
            tmp_path / "root", input_shape=SHAPE, preprocessing=PLAIN, part=part, class_names=("cat", "dog")
        )
        assert found.labels is not None
        counts[found.part] = found.labels.tolist()
    assert counts == {"held-out": [1, 1, 1], "train": [0, 0, 1, 1, 1], "all": [0, 0, 1, 1, 1, 1, 1, 1]}


def split_by_training(entries: list[str]) -> dict[str, Any]:
    return split_record("folder", entries, 0.4, 1)


def test_a_folder_that_training_split_gives_what_was_held_out(classes: Path) -> None:
    files = [classes / name for name in ("cat/10.png", "cat/20.png", "dog/60.png", "dog/70.png", "dog/80.png")]
    record = split_by_training(file_entries(classes, files))
    parts = {
        part: load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN, dataset=record, part=part)
        for part in ("held-out", "train", "all")
    }
    assert [len(parts[part]) for part in parts] == [2, 3, 5]
    greys = {part: stack(found)[:, 0, 0, 0].tolist() for part, found in parts.items()}
    assert sorted(greys["held-out"] + greys["train"]) == sorted(greys["all"])
    assert parts["held-out"].labels is not None
    assert sorted(parts["held-out"].labels) == [0, 1]
    Image.new("RGB", (8, 8)).save(classes / "dog" / "new.png")
    changed = load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN, dataset=record)
    assert (changed.part, len(changed)) == ("changed", 6)
    assert load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN, dataset=record, part="all").part == "all"


def test_an_npz_that_training_split_is_known_by_its_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((10, *SHAPE), dtype=np.float32)
    record = split_by_training(array_entries(images))
    np.savez(tmp_path / "a.npz", input=images, labels=np.arange(10) % 2)
    found = load_samples(tmp_path / "a.npz", input_shape=SHAPE, dataset=record)
    train = load_samples(tmp_path / "a.npz", input_shape=SHAPE, dataset=record, part="train")
    assert (len(found), len(train)) == (4, 6)
    both = np.concatenate([stack(found), stack(train)])
    np.testing.assert_array_equal(np.sort(both.reshape(10, -1), 0), np.sort(images.reshape(10, -1), 0))
    np.savez(tmp_path / "a.npz", input=images[:9], labels=np.arange(9) % 2)
    assert load_samples(tmp_path / "a.npz", input_shape=SHAPE, dataset=record).part == "changed"


def masked_folder(root: Path, names: tuple[str, ...] = ("b", "a")) -> Path:
    """Images of one grey each, and masks whose left half is class 1; 8 x 12, so that the middle is cut out."""
    for sub in ("images", "masks"):
        (root / sub).mkdir(parents=True)
    mask = np.zeros((8, 12), np.uint8)
    mask[:, :6] = 1
    mask[0, 0] = 255
    for name in names:
        Image.new("RGB", (12, 8), (ord(name),) * 3).save(root / "images" / f"{name}.jpg", quality=100)
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    return root


def test_images_and_masks_give_a_class_per_pixel_cut_as_the_images_are(tmp_path: Path) -> None:
    cropped = replace(PLAIN, resize="shortest-then-crop")
    found = load_samples(masked_folder(tmp_path), input_shape=SHAPE, preprocessing=cropped)
    assert (found.masked, found.labels, found.classes, len(found)) == (True, None, None, 2)
    batches = list(found.batches(1))
    assert [round(float(batch.images[0, 0, 0, 0]) * 255) for batch in batches] == [ord("a"), ord("b")]
    mask = batches[0].masks
    assert mask is not None
    assert mask.shape == (1, 8, 8)
    np.testing.assert_array_equal(mask[0, 1], [1, 1, 1, 1, 0, 0, 0, 0])
    assert found.targets()["masks"].shape == (2, 8, 8)
    stretched = next(iter(load_samples(tmp_path, input_shape=SHAPE, preprocessing=PLAIN))).masks
    assert stretched is not None
    assert stretched[0, 0, 0] == 255


@pytest.mark.parametrize("outer", [True, False])
def test_masks_of_train_and_val_are_found_either_way_round(tmp_path: Path, outer: bool) -> None:
    for part, names in (("train", ("a", "b")), ("val", ("c",))):
        folder = masked_folder(tmp_path / "made" / part, names)
        for sub in ("images", "masks"):
            where = tmp_path / "root" / (f"{part}/{sub}" if outer else f"{sub}/{part}")
            shutil.copytree(folder / sub, where)
    found = {
        part: load_samples(tmp_path / "root", input_shape=SHAPE, preprocessing=PLAIN, part=part)
        for part in ("held-out", "train", "all")
    }
    assert {part: (len(one), one.part, one.masked) for part, one in found.items()} == {
        "held-out": (1, "held-out", True),
        "train": (2, "train", True),
        "all": (3, "all", True),
    }


def test_masks_that_are_missing_in_colour_or_of_another_view_are_refused_by_name(tmp_path: Path) -> None:
    masked_folder(tmp_path)
    Image.new("RGB", (12, 8)).save(tmp_path / "masks" / "b.png")
    with pytest.raises(RefusedError, match=r"b\.png: a mask of mode RGB"):
        list(load_samples(tmp_path, input_shape=SHAPE, preprocessing=PLAIN))
    Image.new("L", (8, 12)).save(tmp_path / "masks" / "b.png")
    with pytest.raises(RefusedError, match=r"b\.png: 8 x 12 pixels, its image 12 x 8; a mask covers its image"):
        list(load_samples(tmp_path, input_shape=SHAPE, preprocessing=PLAIN))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (12, 8)).save(tmp_path / "images" / "b.jpg", exif=turned)
    assert len(list(load_samples(tmp_path, input_shape=SHAPE, preprocessing=PLAIN).batches(1))) == 2
    Image.new("L", (16, 24)).save(tmp_path / "masks" / "b.png")  # of the same view, finer
    assert len(list(load_samples(tmp_path, input_shape=SHAPE, preprocessing=PLAIN).batches(1))) == 2
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(RefusedError, match=r"b\.jpg: its mask .*b\.png is missing"):
        load_samples(tmp_path, input_shape=SHAPE, preprocessing=PLAIN).judged()


def test_an_npz_gives_masks_and_every_other_array_by_name(tmp_path: Path) -> None:
    images, masks = np.zeros((5, *SHAPE), np.float32), np.arange(5 * 64, dtype=np.int16).reshape(5, 8, 8)
    boxes = np.arange(30.0).reshape(5, 3, 2)
    np.savez(tmp_path / "a.npz", input=images, masks=masks, boxes=boxes)
    found = load_samples(tmp_path / "a.npz", input_shape=SHAPE, limit=2, seed=1)
    chosen = [int(batch.masks[0, 0, 0]) // 64 for batch in found.batches(1) if batch.masks is not None]
    targets = found.targets()
    assert set(targets) == {"masks", "boxes"}
    np.testing.assert_array_equal(targets["boxes"], boxes[chosen])
    np.testing.assert_array_equal(targets["masks"], masks[chosen])
    np.savez(tmp_path / "a.npz", input=images, boxes=boxes[:4])
    with pytest.raises(RefusedError, match="one row for each of the 5 images"):
        load_samples(tmp_path / "a.npz", input_shape=SHAPE).targets()


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
        (
            {"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.zeros(2, int)},
            r"a.npz: holds x uint8 \(2, 8, 8, 3\), y int64 \(2,\); the network takes float32 \(N, 3, 8, 8\): "
            r"preprocessed images, called 'x', and beside them, to judge by, 'labels': integers \(N,\)",
        ),
        (
            {"input": np.zeros((2, 3, 8, 8))},
            r"holds input float64 \(2, 3, 8, 8\); the network takes float32 \(N, 3, 8, 8\)",
        ),
        ({"input": np.float32(0)}, r"holds input float32 \(\); the network takes"),
        ({"input": np.zeros((0, 3, 8, 8), np.float32)}, "no samples"),
        ({"a": np.zeros(1), "b": np.array([{}])}, r"holds a float64 \(1,\), b \(no plain numbers\); .* called 'input'"),
        ({"input": np.zeros((2, 3, 8, 8), np.float32), "labels": np.zeros(3, int)}, "for each of the 2 images"),
        ({"input": np.array([{}])}, "plain numbers"),
        ({}, "holds no arrays; the network takes"),
    ],
)
def test_npz_files_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(RefusedError, match=words):
        load_samples(tmp_path / "a.npz", input_shape=SHAPE).judged()


@pytest.mark.parametrize("labels", [np.zeros(3, int), np.zeros(2), np.zeros((2, 5), int), np.array([{}, {}])])
def test_labels_that_do_not_fit_an_npz_matter_to_who_judges_by_them_alone(tmp_path: Path, labels: Any) -> None:
    images = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)
    np.savez(tmp_path / "a.npz", input=images, y=labels)
    refuse_missing(tmp_path / "a.npz")
    found = load_samples(tmp_path / "a.npz", input_shape=SHAPE)
    np.testing.assert_array_equal(stack(found.images_alone()), images)
    assert found.labels is None
    with pytest.raises(RefusedError, match=r"a\.npz: .*'y'"):
        found.judged()


def test_labels_and_masks_of_a_folder_that_do_not_fit_matter_to_who_judges_by_them_alone(classes: Path) -> None:
    found = load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN, class_names=["cat", "fish", "bird"])
    assert (found.count, found.labels) == (5, None)
    with pytest.raises(RefusedError, match="sub-folders dog are not among the network's 3 labels"):
        found.judged()


def test_folders_of_which_one_is_misnamed_are_taken_in_their_order_only_where_the_others_allow_it(
    classes: Path,
) -> None:
    order = load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN, class_names=["kitten", "dog"])
    usual = load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN)
    np.testing.assert_array_equal(order.judged().labels, usual.judged().labels)
    moved = load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN, class_names=["dog", "kitten"])
    with pytest.raises(RefusedError, match="sub-folders cat are not among the network's 2 labels; rename them"):
        moved.judged()


def test_a_copy_whose_names_are_decomposed_is_the_same_data(classes: Path) -> None:
    (classes / "cat").rename(classes / "\u00c4ffin")
    (classes / "dog" / "60.png").rename(classes / "dog" / "\u00e9.png")
    copy = classes.with_name("copy")
    for file in classes.rglob("*.png"):
        target = copy / unicodedata.normalize("NFD", file.relative_to(classes).as_posix())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (classes / "notes.txt").unlink()
    files = sorted(classes.rglob("*.png"))
    record = split_record("folder", file_entries(classes, files), 0.4, 0)
    here, there = (
        load_samples(folder, input_shape=SHAPE, preprocessing=PLAIN, dataset=record, class_names=["\u00c4ffin", "dog"])
        for folder in (classes, copy)
    )
    assert here.part == there.part == "held-out"
    np.testing.assert_array_equal(stack(here), stack(there))
    np.testing.assert_array_equal(here.judged().labels, there.judged().labels)


@pytest.mark.parametrize("form", ["split", "class", "images and masks", "file"])
def test_folders_and_files_may_be_links(classes: Path, tmp_path_factory: pytest.TempPathFactory, form: str) -> None:
    kept, folder = tmp_path_factory.mktemp("kept") / "data", tmp_path_factory.mktemp("linked")
    if form == "images and masks":
        masked_folder(kept)
    elif form == "split":
        shutil.copytree(classes, kept / "val")
        shutil.copytree(classes, kept / "train")
    else:
        shutil.copytree(classes, kept)
    for entry in kept.rglob("*.png") if form == "file" else kept.iterdir():
        link = folder / entry.relative_to(kept)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(entry)
    refuse_missing(folder)
    here, there = (load_samples(root, input_shape=SHAPE, preprocessing=PLAIN).judged() for root in (kept, folder))
    np.testing.assert_array_equal(stack(here), stack(there))
    assert here.part == there.part
    assert here.targets()
    for name, values in here.targets().items():
        np.testing.assert_array_equal(there.targets()[name], values)


@pytest.mark.parametrize("link", ["cat/1.png", "bird", "val", "images/1.png", "masks"])
def test_a_link_to_nothing_is_no_smaller_data_set(
    classes: Path, tmp_path_factory: pytest.TempPathFactory, link: str
) -> None:
    """Not accuracy over what is left, the share of the rest being unmounted."""
    folder = classes if link in ("cat/1.png", "bird") else tmp_path_factory.mktemp("data")
    if link == "val":
        shutil.copytree(classes, folder / "train")
    elif folder != classes:
        masked_folder(folder)
    if link == "masks":
        shutil.rmtree(folder / link)
    (folder / link).symlink_to(f"/nowhere/{link}")
    with pytest.raises(RefusedError, match=rf"{link}: is a link to nothing \(/nowhere/{link}\)$"):
        load_samples(folder, input_shape=SHAPE, preprocessing=PLAIN)


def test_masks_are_not_read_for_the_images_alone(tmp_path: Path) -> None:
    masked_folder(tmp_path)
    (tmp_path / "masks" / "b.png").write_bytes(b"no image")
    found = load_samples(tmp_path, input_shape=SHAPE, preprocessing=PLAIN)
    assert len(stack(found.images_alone())) == found.count
    (mask := tmp_path / "masks" / "b.png").unlink()
    for _ in ("missing", "a link to nothing"):
        assert len(load_samples(tmp_path, input_shape=SHAPE, preprocessing=PLAIN).images_alone()) == found.count
        mask.unlink(missing_ok=True)
        mask.symlink_to("/nowhere/b.png")


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
    with pytest.raises(RefusedError, match="nothing says how image files become inputs"):
        load_samples(tmp_path, input_shape=SHAPE)
    with pytest.raises(RefusedError, match=r"makes \(3, 8, 8\) images"):
        load_samples(tmp_path, input_shape=(1, 8, 8), preprocessing=PLAIN)
    with pytest.raises(RefusedError, match="at least 1"):
        load_samples("noise", input_shape=SHAPE, limit=0)


def test_a_damaged_image_in_a_folder_is_refused_by_name(classes: Path) -> None:
    (classes / "cat" / "10.png").write_bytes(b"broken")
    with pytest.raises(RefusedError, match=r"cat/10\.png"):
        stack(load_samples(classes, input_shape=SHAPE, preprocessing=PLAIN))
