"""What an export's proof lets pass in fp32: the table, the float64 yardstick, and the network's own distance to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.onnx.cases import Case, comparison_cases
from export.onnx.interface import output_specs
from export.onnx.options import ExportOptions
from export.onnx.proof import Proof
from export.onnx.reference import Reference
from export.onnx.trained import InMemory, Live
from gmconv import save_golden
from gmconv.certificate import BakeCertificate
from gmconv.foreign import NOTHING
from runtime.parity.cases import NOISE_ALONE
from runtime.parity.tolerances import OWN_DISTANCE
from runtime.runners.base import Array

RNG = np.random.default_rng(0)
EXACT = RNG.standard_normal((64, 10))


def off(by: float, seed: int) -> Array:
    """What a program computes whose sums are so far off."""
    noise = np.random.default_rng(seed).standard_normal(EXACT.shape)
    return (EXACT + by * noise).astype(np.float32)


def proof(live: Array, shipped: Array) -> Proof:
    case, outputs = Case("noise", {"input": EXACT.astype(np.float32)}, yardstick=True, noise=True), {"logits": live}
    reference = Reference((outputs,), (outputs,), ({"logits": EXACT},), BakeCertificate((), 0))
    return Proof([case], reference, [{"logits": shipped}], classes=True)


@pytest.mark.parametrize(
    ("live", "shipped", "passes"),
    [
        (3e-7, 3e-7, True),
        (3e-7, 1e-5, False),  # within the table, far from float64
        (4e-5, 4e-5, True),  # as bad as torch fp32, and no worse
        (4e-5, 2e-6, True),
        (4e-5, 2e-4, False),
        (4e-3, 4e-3, False),  # no proof in fp32
    ],
)
def test_an_artefact_may_be_as_far_off_as_torch_fp32_itself(live: float, shipped: float, passes: bool) -> None:
    verdict = proof(off(live, 1), off(shipped, 2)).judge("fp32")
    assert verdict.passed is passes
    assert verdict.hops[-1].outputs[0].tolerance == pytest.approx(min(max(2e-5, OWN_DISTANCE * live), 2e-4), rel=0.3)


def test_outputs_in_another_order_than_the_networks_are_noted() -> None:
    """Files are read by name, and by position too: the export says where that gives another output."""
    plain = proof(off(3e-7, 1), off(3e-7, 2))
    both = {"boxes": off(3e-7, 1), "scores": off(3e-7, 3)}
    reference = Reference((both,), (both,), (dict.fromkeys(both, EXACT),), BakeCertificate((), 0))
    ordered = replace(plain, reference=reference, shipped=[both])
    swapped = replace(ordered, shipped=[{"scores": both["scores"], "boxes": both["boxes"]}])
    assert ordered.judge("fp32").notes == ()
    assert swapped.judge("fp32").passed
    assert "scores, boxes in the artefact, boxes, scores in the network" in swapped.judge("fp32").notes[0]


def test_a_check_that_could_not_be_made_is_noted(tmp_path: Path) -> None:
    """A lower precision is also run with its activations unrounded, unless ONNX Runtime cannot."""
    plain, outputs = proof(off(3e-7, 1), off(1e-3, 2)), {"logits": off(5e-4, 3)}
    reference = replace(plain.reference, rounded={"fp16": (outputs,)}, weights={"fp16": (outputs,)})
    (tmp_path / "net.onnx").write_bytes(b"no graph")
    verdict = replace(plain, reference=reference).judge_file("fp16", tmp_path / "net.onnx")
    assert verdict.notes[-1].startswith("not compared with its activations unrounded")
    assert "net.onnx" in verdict.notes[-1]


class Table(torch.nn.Module):
    """An image, and a kind of ten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rows = torch.nn.Conv2d(3, 4, 3), torch.nn.Embedding(10, 4)

    def forward(self, image: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        return self.conv(image).mean((2, 3)) + self.rows(kind)


def test_whole_numbers_that_choose_rows_are_drawn_over_the_whole_table_whatever_the_examples_hold() -> None:
    examples = torch.zeros(4, 3, 8, 8), torch.tensor([2, 3, 2, 3])
    loaded = InMemory(Live(Table().eval(), examples, NOTHING)).loaded
    drawn = [case.feeds["kind"] for case in comparison_cases(loaded, ExportOptions()) if case.noise]
    assert set(drawn[-1].tolist()) == set(range(10))
    assert len(drawn[-1]) == 64


def test_noise_alone_is_said_where_nothing_of_the_users_is_compared(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).eval()
    examples = torch.zeros(4, 3, 8, 8)
    save_golden(model, examples, tmp_path / "pairs.npz")
    live = InMemory(Live(model, examples, NOTHING))
    returned, _ = output_specs(live.loaded, ExportOptions(), NOTHING, in_memory=True)
    said: list[str] = []
    comparison_cases(live.loaded, ExportOptions(), note=said.append)
    assert said == [NOISE_ALONE]
    comparison_cases(live.loaded, ExportOptions(), examples=live.examples, note=said.append)
    comparison_cases(live.loaded, ExportOptions(golden=tmp_path / "pairs.npz"), outputs=returned, note=said.append)
    assert said == [NOISE_ALONE]
