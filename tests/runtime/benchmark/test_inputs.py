from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmconv.errors import RefusedError
from runtime.benchmark.inputs import make_feeds, parse_files, parse_shapes, random_values
from runtime.manifest import TensorSpec

NAMES = st.text(st.characters(exclude_characters="':,", exclude_categories=("Cs",)), min_size=1, max_size=8)


@given(st.dictionaries(NAMES, st.lists(st.integers(1, 999), min_size=1, max_size=5), min_size=1, max_size=3))
def test_shapes_are_read_as_trtexec_writes_them(shapes: dict[str, list[int]]) -> None:
    plain = ",".join(f"{name}:{'x'.join(map(str, dims))}" for name, dims in shapes.items())
    quoted = ",".join(f"'{name}':{'x'.join(map(str, dims))}" for name, dims in shapes.items())
    wanted = {name: tuple(dims) for name, dims in shapes.items()}
    assert parse_shapes(plain) == parse_shapes(quoted) == wanted


def test_quotes_hold_a_colon_and_a_scalar_has_no_dims() -> None:
    assert parse_shapes("'input:0':1x3,s:scalar,t:") == {"input:0": (1, 3), "s": (), "t": ()}
    assert parse_files("'input:0':a.raw") == {"input:0": Path("a.raw")}


@given(st.text(max_size=30))
def test_no_text_makes_the_parser_crash(text: str) -> None:
    try:
        shapes = parse_shapes(text)
    except ValueError:
        return
    assert shapes
    assert all(d > 0 for shape in shapes.values() for d in shape)


@pytest.mark.parametrize("text", ["", "input", "input:axb", "input:0x3", "input:-1", ":1x3", "'a:1", "a:1,a:2", "a:²"])
def test_a_malformed_shape_is_named(text: str) -> None:
    with pytest.raises(ValueError):
        parse_shapes(text)


def test_a_dynamic_axis_is_one_or_the_profiles_optimum(host_runner: Any, device_runner: Any) -> None:
    assert make_feeds(host_runner, {}, {}, 0)["input"].shape == (1, 3, 4, 4)
    assert make_feeds(device_runner, {}, {}, 0)["input"].shape == (8, 3, 4, 4)
    assert make_feeds(host_runner, {"input": (5, 3, 4, 4)}, {}, 0)["input"].shape == (5, 3, 4, 4)


def test_random_inputs_follow_the_seed_and_trtexecs_ranges(host_runner: Any) -> None:
    a, b, c = (make_feeds(host_runner, {}, {}, seed)["input"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    rng = np.random.default_rng(0)
    floats = random_values("float32", (1000,), rng)
    assert floats.dtype == np.float32
    assert -1 <= floats.min() < -0.9 < 0.9 < floats.max() <= 1
    assert set(random_values("bool", (100,), rng)) == {False, True}
    assert random_values("int8", (1000,), rng).min() < -100
    assert random_values("uint8", (1000,), rng).max() > 200
    assert set(random_values("int64", (100,), rng)) == {0, 1}, "an index into a table"


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"inptu": (1, 3, 4, 4)}, "inputs are input"),
        ({"input": (1, 3, 5, 4)}, "shape"),
        ({"input": (1, 3, 4)}, "shape"),
    ],
)
def test_a_shape_the_network_does_not_have_is_refused(host_runner: Any, shapes: Any, words: Any) -> None:
    with pytest.raises(RefusedError, match=words):
        make_feeds(host_runner, shapes, {}, 0)


def test_a_batch_outside_the_profile_is_refused(device_runner: Any) -> None:
    with pytest.raises(RefusedError, match="profile"):
        make_feeds(device_runner, {"input": (33, 3, 4, 4)}, {}, 0)


def test_raw_files_are_read_whole_and_only_at_their_size(host_runner: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(3).random((2, 3, 4, 4)).astype(np.float32)
    file = tmp_path / "input.raw"
    values.tofile(file)
    feeds = make_feeds(host_runner, {"input": (2, 3, 4, 4)}, {"input": file}, 0)
    np.testing.assert_array_equal(feeds["input"], values)
    with pytest.raises(RefusedError, match="384 bytes.*takes 192"):
        make_feeds(host_runner, {}, {"input": file}, 0)
    with pytest.raises(RefusedError, match=r"missing\.raw: cannot be read"):
        make_feeds(host_runner, {}, {"input": tmp_path / "missing.raw"}, 0)


def test_bfloat16_inputs_can_be_made() -> None:
    pytest.importorskip("ml_dtypes")
    assert random_values(TensorSpec("x", "bfloat16", (4,)).dtype, (4,), np.random.default_rng(0)).dtype.itemsize == 2
