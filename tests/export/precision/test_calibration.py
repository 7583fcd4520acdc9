"""Ranges from images: exact histograms in constant memory, and sets that cannot set a range are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.precision.calibration import Calibration, RangeHistogram, calibrate
from export.precision.calibration_images import CalibrationImages, open_images
from export.precision.quantize import tensors_to_calibrate
from gmconv.errors import RefusedError

Network = Callable[..., onnx.ModelProto]
SHAPE = (3, 16, 16)
_VALUES = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-(2**20), 2**20, width=32))


@given(batches=st.lists(_VALUES, min_size=1, max_size=5))
def test_a_histogram_counts_every_value_whatever_the_order(batches: list[NDArray[np.float32]]) -> None:
    histogram = RangeHistogram()
    for batch in batches:
        histogram.add(batch)
    everything = np.concatenate(batches)
    assert histogram.counts.sum() == everything.size
    assert histogram.low == everything.min()
    assert histogram.high == everything.max()
    low, high = histogram.range("minmax", 100)
    assert low <= 0 <= high
    assert low == min(everything.min(), 0)
    assert high == max(everything.max(), 0)


@given(values=_VALUES, percentile=st.floats(50, 100))
def test_the_percentile_covers_its_share_and_stays_inside_the_extremes(
    values: NDArray[np.float32], percentile: float
) -> None:
    histogram = RangeHistogram()
    histogram.add(values)
    low, high = histogram.range("percentile", percentile)
    assert min(values.min(), 0) <= low <= 0 <= high <= max(values.max(), 0)
    bound = max(-low, high)
    if bound > 0:
        assert (np.abs(values) <= bound * (1 + 1e-6)).mean() >= percentile / 100 - 1 / values.size


def test_the_limit_grows_without_losing_counts() -> None:
    """Small values first, then larger ones: the same bins as all at once."""
    random = np.random.default_rng(0)
    parts = [random.standard_normal(1000).astype(np.float32) * 2.0**k for k in (-6, 0, 5)]
    grown, whole = RangeHistogram(), RangeHistogram()
    for part in parts:
        grown.add(part)
    whole.add(np.concatenate(parts[::-1]))
    assert grown.limit == whole.limit
    # A value that sits within rounding of a bin's edge may fall on either side of it.
    assert np.abs(grown.counts - whole.counts).sum() <= 4


def test_entropy_clips_an_outlier_that_percentiles_of_few_values_keep() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values[0] = 1000
    histogram = RangeHistogram()
    histogram.add(values)
    _, high = histogram.range("entropy", 0)
    assert 2 < high < 100
    assert histogram.range("minmax", 0)[1] == 1000


def test_entropy_keeps_a_discrete_distribution_whole() -> None:
    histogram = RangeHistogram()
    histogram.add(np.repeat(np.arange(17, dtype=np.float32) / 16, 1000))
    assert histogram.range("entropy", 0)[1] == 1


def calibrated(model: onnx.ModelProto, images: CalibrationImages) -> Calibration:
    return calibrate(model, images, tensors_to_calibrate(model, "tensorrt"))


def test_ranges_are_those_of_the_activations_and_do_not_depend_on_the_batch(network: Network, npz: Path) -> None:
    model = network()
    found = []
    for batch in (1, 3, 40):
        images = open_images(npz, SHAPE)
        images.batch = batch
        found.append(calibrated(model, images))
    assert list(found[0].histograms) == ["input", "b", "e", "i"]
    low, high = found[0].ranges("minmax")["input"]
    assert (low, high) == (0.0, pytest.approx(1, abs=1e-3))
    for other in found[1:]:
        for name, (low, high) in found[0].ranges("minmax").items():
            np.testing.assert_allclose(other.ranges("minmax")[name], (low, high), rtol=1e-5, err_msg=name)
        assert other.origin == found[0].origin


def test_the_manifest_says_which_images(network: Network, npz: Path) -> None:
    done = calibrated(network(), open_images(npz, SHAPE, limit=10, seed=3))
    info = done.info("percentile", 99.9)
    assert info.source == "images.npz"
    assert (info.images, info.seed, info.percentile) == (10, 3, 99.9)
    assert len(info.sha256) == 64
    again = calibrated(network(), open_images(npz, SHAPE, limit=10, seed=3)).origin
    other = calibrated(network(), open_images(npz, SHAPE, limit=10, seed=4)).origin
    assert again == done.origin
    assert other.sha256 != done.origin.sha256


def test_digits_for_calibration_are_not_those_accuracy_is_measured_on() -> None:
    from gmconv.data import load_samples

    split = {"name": "digits", "test_size": 0.2, "split_seed": 0}
    images = open_images("digits", (1, 8, 8), limit=1797, dataset=split)
    seen = {image.tobytes() for (batch,) in images.batches() for image in batch}
    held_out = [image for part in load_samples("digits", input_shape=(1, 8, 8), dataset=split) for image in part.images]
    assert images.count == 1437
    # scikit-learn's set holds a few digits twice; the split is by index.
    assert sum(image.tobytes() in seen for image in held_out) <= 2


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (
            np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32),
            "1 calibration image; ranges need at least two",
        ),
        (np.full((8, *SHAPE), 0.5, np.float32), "one constant colour"),
        (np.linspace(0, 1, 8, dtype=np.float32)[:, None, None, None] * np.ones((8, *SHAPE), np.float32), "constant"),
        (np.repeat(np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32), 8, 0), "are the same"),
        (np.zeros((8, 3, 8, 8), np.float32), "the network takes float32"),
        (np.zeros((8, *SHAPE), np.uint8), "the network takes float32"),
        (np.full((8, *SHAPE), np.nan, np.float32), "sample 0 holds NaN"),
    ],
)
def test_images_that_cannot_set_a_range_are_refused(
    network: Network, tmp_path: Path, images: NDArray[np.float32], reason: str
) -> None:
    np.savez(tmp_path / "x.npz", input=images)
    with pytest.raises(RefusedError, match=reason):
        calibrated(network(), open_images(tmp_path / "x.npz", SHAPE))


def test_a_missing_source_and_a_single_image_limit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such data"):
        open_images(tmp_path / "nothing", SHAPE)
    with pytest.raises(RefusedError, match="at least two"):
        open_images("digits", SHAPE, limit=1)


def test_nan_activations_name_their_layer(network: Network, npz: Path) -> None:
    broken = np.zeros(8, np.float32)
    broken[3] = np.inf
    model = network(edit={"block.conv1.bias": broken})
    # Infinity after the residual block, NaN where infinities meet: the block is where it begins.
    with pytest.raises(RefusedError, match=r"layer 'block.conv1' produced NaN or infinity \(tensor 'e'"):
        calibrated(model, open_images(npz, SHAPE))


def test_a_fixed_batch_leaves_out_the_rest(network: Network, npz: Path) -> None:
    images = open_images(npz, SHAPE, limit=10)
    images.batch, images.fixed_batch = 4, True
    assert calibrated(network(batch=4), images).origin.images == 8


def convert(folder: Path, name: str, images: int) -> tuple[dict[str, Any], int]:
    """`python -m export.precision` on so many images of a set: the manifest, and the process's peak memory in bytes."""
    command = [
        sys.executable,
        "-m",
        "export.precision",
        str(folder / "m.onnx"),
        "--to",
        "int8",
        "-o",
        str(folder / name),
    ]
    command += ["--calibration-npz", str(folder / "x.npz"), "--calibration-images", str(images), "--json", "--quiet"]
    with (folder / "out").open("w+") as output:
        child = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0
        output.seek(0)
        return json.load(output), usage.ru_maxrss * 1024


@pytest.mark.slow
def test_ten_thousand_images_fit_in_two_gigabytes(tmp_path: Path) -> None:
    """Neither the set (2.5 GB) nor the activations (16 GB) would; memory is that of a batch, whatever the set."""
    size, count, tile = 144, 10_000, 100
    random = np.random.default_rng(0)
    shapes = {"c.weight": (16, 3, 3, 3), "d.weight": (4, 16, 1, 1)}
    weights = [numpy_helper.from_array(random.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["input", "c.weight"], ["a"], pads=[1] * 4, name="c"),
        helper.make_node("Relu", ["a"], ["b"], name="r"),
        helper.make_node("Conv", ["b", "d.weight"], ["y"], name="d"),
    ]
    values = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, size, size])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, size, size])]
    graph = helper.make_graph(nodes, "g", values, out, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    images = random.random((tile, 3, size, size), dtype=np.float32)
    try:
        archive = zipfile.ZipFile(tmp_path / "x.npz", "w")
        with archive, archive.open("input.npy", "w", force_zip64=True) as stream:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, 3, size, size)}
            np.lib.format.write_array_header_1_0(stream, header)
            for k in range(count // tile):
                stream.write((images * np.float32(1 + k / tile)).tobytes())
        assert (tmp_path / "x.npz").stat().st_size > 2 * 2**30
        _, few = convert(tmp_path, "few.onnx", tile)
        manifest, peak = convert(tmp_path, "all.onnx", count)
    finally:
        (tmp_path / "x.npz").unlink(missing_ok=True)  # pytest keeps three runs
    assert manifest["calibration"]["images"] == count
    assert peak < 2 * 2**30, f"{peak / 2**20:.0f} MiB"
    assert peak < few + 64 * 2**20, f"{count} images take {peak / 2**20:.0f} MiB, {tile} take {few / 2**20:.0f}"


@pytest.mark.parametrize(
    ("labels", "warned"),
    [
        (np.arange(40) % 4, []),
        (np.zeros(40, int), ["of one class"]),
        (np.arange(10) % 4, ["on 10 images"]),
        (np.zeros(10, int), ["on 10 images", "of one class"]),
    ],
)
def test_few_images_or_one_class_are_warned_of(labels: NDArray[np.int64], warned: list[str], tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((len(labels), *SHAPE), dtype=np.float32)
    np.savez(tmp_path / "own.npz", input=images, labels=labels)
    found = open_images(tmp_path / "own.npz", SHAPE).warnings
    assert len(found) == len(warned)
    assert all(words in text for words, text in zip(warned, found, strict=True))


def test_digits_under_a_network_that_was_not_trained_on_them_are_warned_of() -> None:
    assert open_images("digits", (1, 8, 8), dataset={"name": "digits"}).warnings == ()
    assert "nothing says" in open_images("digits", (1, 8, 8)).warnings[0]
