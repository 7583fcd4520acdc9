"""`runtime.runners.feeds`: an .npz file's arrays become inputs by their names, or one sentence says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmconv.errors import RefusedError
from runtime.artefact import Facts
from runtime.manifest import TensorSpec
from runtime.runners.feeds import read_feeds, sized

IMAGE = TensorSpec("image", "float32", ("batch", 3, "height", 8))
META = TensorSpec("meta", "int32", ("batch", 4))


def arrays(**other: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {"image": random.random((6, 3, 5, 8)), "meta": np.arange(24).reshape(6, 4), "labels": np.zeros(6)} | other


def test_each_input_has_its_array_in_its_dtype(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **(given := arrays()))
    feeds = read_feeds(tmp_path / "x.npz", (META, IMAGE))
    assert {name: array.dtype.name for name, array in feeds.items()} == {"meta": "int32", "image": "float32"}
    np.testing.assert_array_equal(feeds["image"], given["image"].astype(np.float32))


def test_a_draw_takes_the_same_rows_of_each_array_in_their_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **(given := arrays()))
    feeds = read_feeds(tmp_path / "x.npz", (IMAGE, META), limit=3, seed=1)
    rows = feeds["meta"][:, 0] // 4
    assert len(rows) == 3
    assert sorted(set(rows.tolist())) == rows.tolist()
    np.testing.assert_array_equal(feeds["image"], given["image"][rows].astype(np.float32))


def test_the_only_array_of_the_only_input_may_have_any_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arrays()["meta"])
    assert list(read_feeds(tmp_path / "x.npz", (META,))) == ["meta"]


def test_free_sides_are_those_of_the_data_then_the_usual_ones(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=arrays()["image"], labels=np.zeros(6))
    usual = Facts(shapes={"image": (3, 64, 8)})
    assert sized([IMAGE], usual, tmp_path / "x.npz")[0].shape == ("batch", 3, 5, 8)
    assert sized([IMAGE], usual, tmp_path)[0].shape == ("batch", 3, 64, 8)
    assert sized([IMAGE, META], Facts(), tmp_path / "x.npz") == [IMAGE, META]  # "images" is neither's name


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"meta": np.zeros((6, 5), np.int32)}, r"'meta' is int32 \(6, 5\); the network takes image float32 \(batch, 3"),
        ({"meta": np.zeros(6, np.int32)}, r"'meta' is int32 \(6,\); .* meta int32 \(batch, 4\)$"),
        ({"meta": np.zeros((6, 4))}, r"'meta' is float64"),
        ({"image": np.zeros((6, 3, 5, 8), np.uint8)}, r"'image' is uint8"),
        ({"image": np.full((6, 3, 5, 8), np.nan)}, "'image' holds NaN"),
        ({"meta": np.zeros((5, 4), np.int32)}, "the same number of samples"),
    ],
)
def test_an_array_that_does_not_fit_is_refused_by_its_name(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays(**other))
    with pytest.raises(RefusedError, match=said):
        read_feeds(tmp_path / "x.npz", (IMAGE, META))


def test_a_missing_array_is_named_with_those_there_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", picture=arrays()["image"], meta=arrays()["meta"])
    said = r"holds picture float64 \(6, 3, 5, 8\), meta .*, no 'image'; the network takes image"
    with pytest.raises(RefusedError, match=said):
        read_feeds(tmp_path / "x.npz", (IMAGE, META))
