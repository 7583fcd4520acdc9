"""Golden pairs: recorded by anybody's program, read by name, and refused unless they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gmconv
from gmconv.errors import RefusedError
from gmconv.golden import read_golden
from gmconv.inputs import arguments_of, noise


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
    golden = read_golden(tmp_path / "golden.npz", ["input"], ["logits"])
    assert golden.samples == 5
    with torch.no_grad():
        expected = model.eval()(torch.cat(batches)).numpy()
    assert np.allclose(golden.outputs["logits"], expected, atol=1e-6)


def test_several_inputs_and_outputs_go_by_their_names(tmp_path: Path) -> None:
    x, mask = torch.randn(2, 3), torch.randn(2, 3)
    gmconv.save_golden(Two(), {"mask": mask, "image": x}, tmp_path / "golden.npz")
    golden = read_golden(tmp_path / "golden.npz", ["image", "mask"], ["sum", "mask"])
    assert np.array_equal(golden.inputs["mask"], mask.numpy())
    assert np.array_equal(golden.outputs["sum"], (x + mask).numpy())
    assert np.array_equal(golden.outputs["mask"], mask.numpy())


@pytest.mark.parametrize("names", [("input", "output"), ("x", "y"), ("images", "logits"), ("input", "logits")])
def test_any_program_may_write_one(names: tuple[str, str], tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", **{names[0]: np.ones((2, 3)), names[1]: np.zeros((2, 4))})  # type: ignore[arg-type]
    assert read_golden(tmp_path / "g.npz", ["input"], ["logits"]).outputs["logits"].shape == (2, 4)


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
        read_golden(tmp_path / "golden.npz", ["input"], ["logits"])


def test_an_array_is_one_batch_as_a_tensor_is(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3), dtype=np.float32)
    for given in (x, torch.from_numpy(x), [x[:1], x[1:]], iter([x])):
        gmconv.save_golden(nn.Tanh(), given, tmp_path / "golden.npz")
        golden = read_golden(tmp_path / "golden.npz", ["input"], ["logits"])
        assert np.array_equal(golden.inputs["input"], x)
        assert np.allclose(golden.outputs["logits"], np.tanh(x), atol=1e-6)
    gmconv.save_golden(Two(), (x, x), tmp_path / "two.npz")
    assert read_golden(tmp_path / "two.npz", ["image", "mask"], ["sum", "mask"]).samples == 4


def test_bfloat16_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="input 'input' is in bfloat16, .*float"):
        gmconv.save_golden(nn.Tanh().bfloat16(), torch.ones(2, 3).bfloat16(), tmp_path / "golden.npz")


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
        (["a"], "is a str"),
    ],
)
def test_examples_that_are_none_are_refused(examples: Any, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        arguments_of(Two(), examples)
