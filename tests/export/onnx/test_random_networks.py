"""Whatever exports with PASSED computes what torch computes, also on inputs that the proof did not see."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import gmconv
from gmconv.errors import ParityError
from gmconv.foreign import Foreign
from runtime.parity.tolerances import tolerance_for
from runtime.runners import open_runner
from tests.export.onnx.random_networks import BETWEEN, HEADS, LAYERS, make

SIZE = 24
TOLERANCES = 10


@st.composite
def words(draw: st.DrawFn) -> list[str]:
    """One to six layers in any order, with a convolution that is masked more often than not, and a head."""
    chosen = draw(st.lists(st.sampled_from((*LAYERS, *BETWEEN)), max_size=5))
    masked = draw(st.sampled_from(("masked7", "masked7", "conv3")))
    return [*chosen[:2], masked, *chosen[2:], draw(st.sampled_from(HEADS))]


def inputs(dynamic: bool) -> dict[str, Any]:
    """Fresh inputs of other distributions than unit noise, at batches and, where they are free, sizes not yet seen."""
    random = np.random.default_rng(7)
    odd = (29, 37) if dynamic else (SIZE, SIZE)
    shapes = {"bright": (1, 3, SIZE, SIZE), "sparse": (5, 3, *odd), "constant": (2, 3, *odd), "large": (17, 3, *odd)}
    values = {
        "bright": random.uniform(0.8, 1, shapes["bright"]),
        "sparse": random.standard_normal(shapes["sparse"]) * (random.random(shapes["sparse"]) < 0.02),
        "constant": np.full(shapes["constant"], 0.5),
        "large": 20 * random.standard_normal(shapes["large"]),
    }
    return {name: array.astype(np.float32) for name, array in values.items()}


def exported(chosen: list[str], folder: Path, precision: Any, dynamic: bool) -> Path | None:
    """The file, or None where half precision is refused, as it may be; in fp32 none of these networks may."""
    from export.onnx.pipeline import ExportOptions, export_onnx

    arch = "tests.export.onnx.random_networks:make"
    gmconv.save_checkpoint(folder / "net.pt", make(chosen), arch, (3, SIZE, SIZE), {"words": chosen})
    options = ExportOptions(foreign=Foreign(arch=arch), dynamic_hw=dynamic, precisions=(precision,))
    try:
        export_onnx(folder / "net.pt", folder / "net.onnx", options)
    except ParityError:
        if precision == "fp32":
            raise
        return None
    return folder / "net.onnx"


def check(chosen: list[str], precision: Any, dynamic: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = exported(chosen, Path(folder), precision, dynamic)
        if path is None:
            return
        limit, model = TOLERANCES * tolerance_for(precision).rel_rms, make(chosen)
        with open_runner(path, device="cpu") as runner:
            for name, x in inputs(dynamic).items():
                with torch.no_grad():
                    expected = model(torch.from_numpy(x))
                found = runner.run({"input": x}).values()
                for a, b in zip(expected if isinstance(expected, tuple) else (expected,), found, strict=True):
                    assert a.shape == b.shape, name
                    error = float(np.sqrt(np.mean((a.numpy() - b) ** 2)))
                    assert error <= limit * float(a.square().mean().sqrt()), f"{chosen}, {name}: {error:g}"


CASES = {"chosen": words(), "precision": st.sampled_from(("fp32", "fp32", "fp16", "bf16")), "dynamic": st.booleans()}
QUICK = settings(deadline=None, database=None, derandomize=True, phases=[Phase.generate])


@given(**CASES)
@settings(QUICK, max_examples=2, suppress_health_check=list(HealthCheck))
def test_what_passed_agrees_with_torch_on_inputs_it_was_not_proven_on(
    chosen: list[str], precision: Any, dynamic: bool
) -> None:
    check(chosen, precision, dynamic)


@pytest.mark.slow
@given(**CASES)
@settings(deadline=None, database=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_many_more(chosen: list[str], precision: Any, dynamic: bool) -> None:
    check(chosen, precision, dynamic)
