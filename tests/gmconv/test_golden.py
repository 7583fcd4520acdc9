"""Golden pairs: recorded by anybody's program, read by name, and refused unless they are whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gmconv
from gmconv.errors import RefusedError, UnavailableError
from gmconv.golden import read_golden
from gmconv.inputs import arguments_of, noise
from runtime.manifest import TensorSpec


def spec(name: str, *sides: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, ("batch", *sides))


TWO = [spec("image", 3), spec("mask", 3)]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, image: Tensor, mask: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        image = image if scale is None else image * scale
        return {"sum": self.drop(image + mask), "mask": mask}


def test_what_is_recorded_is_what_the_network_computes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).train()
    batches = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)]
    gmconv.save_golden(model, batches, tmp_path / "golden.npz")
    assert model.training
    golden = read_golden(tmp_path / "golden.npz", [spec("input", 3, "h", "w")], [spec("logits", 4, 6, 6)])
    assert golden.samples == 5
    with torch.no_grad():
        expected = model.eval()(torch.cat(batches)).numpy()
    assert np.allclose(golden.outputs["logits"], expected, atol=1e-6)


def test_several_inputs_and_outputs_go_by_their_names(tmp_path: Path) -> None:
    x, mask = torch.randn(2, 3), torch.randn(2, 3)
    gmconv.save_golden(Two(), {"mask": mask, "image": x}, tmp_path / "golden.npz")
    golden = read_golden(tmp_path / "golden.npz", TWO, [spec("sum", 3), spec("mask", 3)])
    assert np.array_equal(golden.inputs["mask"], mask.numpy())
    assert np.array_equal(golden.outputs["sum"], (x + mask).numpy())
    assert np.array_equal(golden.outputs["mask"], mask.numpy())


@pytest.mark.parametrize("names", [("input", "output"), ("x", "y"), ("images", "logits"), ("input", "logits")])
def test_any_program_may_write_one(names: tuple[str, str], tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", **{names[0]: np.ones((2, 3)), names[1]: np.zeros((2, 4))})  # type: ignore[arg-type]
    assert read_golden(tmp_path / "g.npz", [spec("input", 3)], [spec("logits", 4)]).outputs["logits"].shape == (2, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input": np.ones((2, 3))}, r"holds input float64 \(2, 3\), and no output 'logits'"),
        ({"input": np.ones((2, 3)), "output": np.ones((3, 4))}, "different numbers of samples"),
        ({"input": np.ones((0, 3)), "output": np.ones((0, 4))}, "or none"),
        ({"input": np.ones((2, 3)), "output": np.ones((2, 4)), "weights": np.ones((2,))}, "'weights' is no input"),
        ({"input": np.array([object()]), "output": np.ones((1, 4))}, "plain numbers"),
    ],
)
def test_pairs_that_are_not_whole_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", **arrays)
    with pytest.raises(RefusedError, match=message):
        read_golden(tmp_path / "golden.npz", [spec("input", 3)], [spec("logits", 4)])


def test_an_array_is_one_batch_as_a_tensor_is(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3), dtype=np.float32)
    for given in (x, torch.from_numpy(x), [x[:1], x[1:]], iter([x])):
        gmconv.save_golden(nn.Tanh(), given, tmp_path / "golden.npz")
        golden = read_golden(tmp_path / "golden.npz", [spec("input", 3)], [spec("logits", 3)])
        assert np.array_equal(golden.inputs["input"], x)
        assert np.allclose(golden.outputs["logits"], np.tanh(x), atol=1e-6)
    gmconv.save_golden(Two(), (x, x), tmp_path / "two.npz")
    assert read_golden(tmp_path / "two.npz", TWO, [spec("sum", 3), spec("mask", 3)]).samples == 4


def test_bfloat16_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="input 'input' is in bfloat16, .*float"):
        gmconv.save_golden(nn.Tanh().bfloat16(), torch.ones(2, 3).bfloat16(), tmp_path / "golden.npz")


def test_a_traced_network_is_recorded_by_the_names_of_its_arguments(tmp_path: Path) -> None:
    x, mask = torch.randn(2, 3), torch.randn(2, 3)
    traced = torch.jit.trace(Two().eval(), (x, mask), strict=False)
    gmconv.save_golden(traced, {"mask": mask, "image": x}, tmp_path / "golden.npz")
    golden = read_golden(tmp_path / "golden.npz", TWO, [spec("sum", 3), spec("mask", 3)])
    assert np.array_equal(golden.outputs["sum"], (x + mask).numpy())


def test_a_forward_that_is_no_python_takes_anything(tmp_path: Path) -> None:
    model = nn.Identity()
    model.forward = torch.relu  # type: ignore[assignment]
    gmconv.save_golden(model, torch.full((2, 3), -1.0), tmp_path / "golden.npz")
    assert not read_golden(tmp_path / "golden.npz", [spec("input", 3)], [spec("logits", 3)]).outputs["logits"].any()


class Stuttering(nn.Module):
    """Draws random numbers in eval mode too, or counts its calls."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + (self.calls if self.counts else torch.randn_like(x))


@pytest.mark.parametrize("counts", [True, False])
def test_a_network_that_answers_twice_in_two_ways_is_refused(counts: bool, tmp_path: Path) -> None:
    words = r"run twice .* two answers \(output 'logits' differs by .* draws random numbers, or changes a buffer"
    with pytest.raises(RefusedError, match=words):
        gmconv.save_golden(Stuttering(counts), torch.ones(2, 3), tmp_path / "golden.npz")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_nothing_can_be_compared_with_are_refused(tmp_path: Path) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(x)

    with pytest.raises(RefusedError, match="output 'logits' is NaN or infinite"):
        gmconv.save_golden(Root(), torch.full((2, 3), -1.0), tmp_path / "golden.npz")


def test_what_a_forward_writes_in_place_is_not_recorded(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.zeros(1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.held.copy_(x.mul_(2))

    x = torch.arange(6.0).reshape(2, 3)
    gmconv.save_golden(InPlace(), [x[:1], x[1:]], tmp_path / "golden.npz")
    golden = read_golden(tmp_path / "golden.npz", [spec("input", 3)], [spec("logits", 3)])
    assert np.array_equal(golden.inputs["input"], x.numpy())
    assert np.array_equal(golden.outputs["logits"], 2 * x.numpy())
    assert x.flatten().tolist() == list(range(6)), "the user's own tensor stays as it is"


class Says(nn.Module):
    """What is said of it instead of a recording: its forward is `way`."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.head = way, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.head(x))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (lambda y: y[:, 7], r"whose forward takes \(x\), does not run on samples of 3 in a batch of 2 \(index 7"),
        (lambda y: y.mean(), r"output 'logits' has shape \(\) for 2 samples, and pairs hold a row for each"),
        (lambda y: y[:1], r"output 'logits' has shape \(1, 3\) for 2 samples"),
        (lambda y: torch.fft.fft(y), "output 'logits' is complex, .* return torch.view_as_real"),
        (lambda y: y.to_sparse(), "output 'logits' is sparse, .* return y.to_dense"),
        (lambda y: y.bfloat16(), "output 'logits' is in bfloat16"),
    ],
)
def test_outputs_that_are_no_pairs_are_refused(way: Callable[[Tensor], Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=words):
        gmconv.save_golden(Says(way), torch.randn(2, 3), tmp_path / "golden.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_values_or_without_an_eval_mode_is_refused(tmp_path: Path) -> None:
    program: Any = torch.export.export(nn.Linear(3, 3), (torch.ones(2, 3),)).module()
    for model, words in (
        (nn.Linear(3, 3, device="meta"), "'weight' is on the meta device and has no values"),
        (nn.LazyLinear(3), "'weight' is lazy and has no values yet"),
        (program, "cannot be put into eval mode"),
    ):
        with pytest.raises(RefusedError, match=words):
            gmconv.save_golden(model, torch.randn(2, 3), tmp_path / "golden.npz")
    with pytest.raises(RefusedError, match="the example 'input' is on the meta device"):
        gmconv.save_golden(nn.Tanh(), torch.ones(2, 3, device="meta"), tmp_path / "golden.npz")


def test_each_part_has_its_own_mode_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    model[1].eval()
    gmconv.save_golden(model, torch.ones(2, 3), tmp_path / "golden.npz")
    assert [module.training for module in model.modules()] == [True, True, False]


def test_no_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no batches"):
        gmconv.save_golden(nn.Identity(), [], tmp_path / "golden.npz")
    assert list(tmp_path.iterdir()) == []


def test_examples_by_name_reach_the_forward_by_name() -> None:
    tensors = {"mask": torch.full((1, 1), 2.0), "image": torch.ones(1, 1), "scale": torch.full((1, 1), 3.0)}
    arguments = arguments_of(Two().eval(), tensors)
    assert list(arguments.tensors) == ["image", "mask", "scale"]
    assert float(arguments.call(Two().eval(), torch.device("cpu"))["sum"]) == 5


def test_noise_keeps_to_the_integers_of_the_examples() -> None:
    arguments = arguments_of(nn.Identity(), torch.tensor([[3], [5]]))
    assert set(noise(arguments.inputs, 100)["input"].ravel().tolist()) == {3, 4, 5}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"nothing": torch.ones(1), "image": torch.ones(1)}, "there is no 'nothing'"),
        ({"scale": torch.ones(1), "image": torch.ones(1)}, "takes 'mask' before 'scale'"),
        ([], "no example"),
        (["a"], r"is no tensor \(str\)"),
    ],
)
def test_examples_that_are_none_are_refused(examples: Any, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        arguments_of(Two(), examples)


@pytest.mark.parametrize(
    ("taken", "recorded"),
    [("float32", "float64"), ("float32", "float16"), ("float16", "float32"), ("int64", "uint8"), ("uint8", "int64")],
)
def test_inputs_of_another_width_are_taken_where_no_number_changes(taken: str, recorded: str, tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3)
    np.savez(tmp_path / "g.npz", input=values.astype(recorded), output=np.ones((2, 4), "float32"))
    golden = read_golden(tmp_path / "g.npz", [spec("input", 3, dtype=taken)], [spec("logits", 4)])
    assert golden.inputs["input"].dtype == taken
    assert np.array_equal(golden.inputs["input"], values)


@pytest.mark.parametrize(
    ("array", "taken", "words"),
    [
        (np.ones((2, 3), "uint8"), "float32", "'input' is uint8 (2, 3), the network takes float32 (N, 3); record what"),
        (np.ones((2, 3), "int64"), "float32", "'input' is int64 (2, 3), the network takes float32 (N, 3); record what"),
        (np.ones((2, 3), "bool"), "float32", "'input' is bool"),
        (np.ones((2, 3), "float32"), "int64", "'input' is float32 (2, 3), the network takes int64"),
        (np.ones((2, 4), "float32"), "float32", "'input' is float32 (2, 4), the network takes float32 (N, 3)"),
        (np.full((2, 3), 300), "uint8", "'input' holds int64 that uint8, which the network takes, has not"),
        (np.full((2, 3), -1), "uint8", "'input' holds int64 that uint8"),
    ],
)
def test_inputs_of_another_kind_are_refused(array: Any, taken: str, words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", input=array, output=np.ones((2, 4), "float32"))
    with pytest.raises(RefusedError, match=re.escape(words)):
        read_golden(tmp_path / "g.npz", [spec("input", 3, dtype=taken)], [spec("logits", 4)])


@pytest.mark.parametrize(
    "array",
    [np.array([1, 3]), np.ones((2, 5), "float32"), np.ones((2, 4, 1), "float32"), np.ones((2, 4), "int64")],
    ids=["labels", "another width", "another rank", "whole numbers"],
)
def test_outputs_that_cannot_be_the_networks_are_refused(array: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", input=np.ones((2, 3), "float32"), output=array)
    with pytest.raises(RefusedError, match=r"the network returns float32 \(N, 4\); record what forward returns"):
        read_golden(tmp_path / "g.npz", [spec("input", 3)], [spec("logits", 4)])


def test_a_full_disk_leaves_no_half_of_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UnavailableError, match=r"pairs\.npz: cannot be written \(No space left"):
        gmconv.save_golden(nn.Tanh(), torch.ones(2, 3), tmp_path / "pairs")
    assert list(tmp_path.iterdir()) == []


def test_a_network_in_wrappers_is_recorded_by_its_own_names(tmp_path: Path) -> None:
    class Less(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left - right

    given = {"right": torch.ones(2, 3), "left": torch.full((2, 3), 3.0)}
    gmconv.save_golden(nn.DataParallel(Less()), given, tmp_path / "pairs")
    with np.load(tmp_path / "pairs.npz") as pairs:
        assert (pairs["input.right"] == 1).all()
        assert (pairs["output"] == 2).all()


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_folder_is_no_name_of_pairs(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedError, match="is a directory; give a file name"):
        gmconv.save_golden(torch.nn.Identity(), torch.zeros(1, 2), path)
    assert list(tmp_path.iterdir()) == []


def test_data_are_not_replaced_by_pairs_and_pairs_are(tmp_path: Path) -> None:
    net, path = nn.Linear(3, 2), tmp_path / "mine.npz"
    np.savez(path, input=np.arange(5), labels=np.arange(5))
    with pytest.raises(RefusedError, match=r"mine.npz: is there and holds no golden pairs \(input, labels\)"):
        gmconv.save_golden(net, torch.ones(2, 3), path)
    assert set(np.load(path)) == {"input", "labels"}
    for _ in range(2):
        gmconv.save_golden(net, torch.ones(2, 3), tmp_path / "pairs.npz")
