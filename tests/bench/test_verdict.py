"""A few errors planted into an artefact are refused, and its clean self passes: the bench counts many more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.graph.check import save_graph
from runtime.manifest import read_manifest
from runtime.parity.run import ParityOptions, compare_artefacts
from tests.bench.verdict import Count, moved, table
from tests.bench.verdict_errors import ERRORS, plant

KINDS = ("zeroed kernel", "shifted kernel", "lost bias", "off-by-one label", "another branch")


def test_planted_errors_are_refused_and_the_clean_artefact_is_not(
    digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path
) -> None:
    manifest, files = read_manifest(digits_onnx), {"clean": digits_onnx}
    for planted in plant(onnx.load(digits_onnx), (66,)):
        if planted.kind in KINDS:
            files[planted.kind] = tmp_path / f"{len(files)}.onnx"
            save_graph(planted.model, files[planted.kind], manifest)
    said = compare_artefacts(digits_checkpoint, files.values(), ParityOptions(samples=16, yardstick=False))
    passed = {kind: candidate.passed for kind, candidate in zip(files, said.candidates, strict=True)}
    assert passed == {"clean": True, **dict.fromkeys(KINDS, False)}


def test_every_error_that_a_graph_has_room_for_changes_it(digits_onnx: Path) -> None:
    clean = onnx.load(digits_onnx)
    found = {planted.kind: planted.model for planted in plant(clean, (50,))}
    assert found.keys() == ERRORS.keys() - {"wrong zero point"}  # nothing is quantized
    assert all(wrong.SerializeToString() != clean.SerializeToString() for wrong in found.values())


@pytest.mark.parametrize(("by", "matters"), [(0.5, False), (2.0, True), (np.nan, True)])
def test_an_error_counts_when_it_moves_a_value_by_more_than_the_precision_does(by: float, matters: bool) -> None:
    live, clean = [{"o": np.zeros((2, 3))}], [{"o": np.full((2, 3), 0.01)}]
    wrong = [{"o": clean[0]["o"] + np.eye(2, 3) * 0.01 * by}]
    assert moved(live, clean, wrong) is matters


def test_the_table_adds_up() -> None:
    total = Count(planted=3, caught=2, clean=1) + Count(planted=1, caught=1, clean=1)
    assert table("precision", {"int8": total})[2] == "| int8 | 3 / 4 | 75.0 % | 0 | 0 / 2 |"
