"""A user's metric: what it is given, what it may return, and one sentence for everything else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmconv.data import Batch
from gmconv.errors import RefusedError
from runtime.evaluate.accuracy import wilson
from runtime.evaluate.metric import MetricJudge, MetricScore, load_metric

TARGETS = {"boxes": np.arange(6.0).reshape(3, 2)}


def scores(metric: Any, outputs: list[np.ndarray]) -> list[MetricScore]:
    judge = MetricJudge(metric, "near", TARGETS)
    for rows in (slice(0, 2), slice(2, 3)):
        judge.add([{"a": one[rows], "b": one[rows, :1]} for one in outputs], Batch(outputs[0][rows], None))
    return judge.scores()


def near(outputs: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> np.ndarray:
    assert set(outputs) == {"a", "b"}
    assert outputs["b"].shape == (3, 1)
    return -np.abs(outputs["a"] - targets["boxes"]).mean(1)


def test_it_sees_all_samples_once_and_gives_one_value_for_each() -> None:
    right = TARGETS["boxes"].astype(np.float32)
    first, second = scores(near, [right, right + np.array([[0], [1], [2]], np.float32)])
    assert first.value.value == 0
    assert (second.samples, second.value.value, second.lost) == (3, -1, 1)
    assert second.value.interval is not None
    assert second.drop.interval is not None
    assert second.cells()[0].heading == "near (metric) [95%]"
    assert second.to_dict()["value"]["value"] == -1


@pytest.mark.parametrize("hits", [[1, 1, 1], [0, 0, 0], [1, 0, 1]])
def test_hits_have_the_interval_that_accuracy_has(hits: list[int]) -> None:
    (found,) = scores(lambda *_: np.array(hits), [np.ones((3, 2))])
    assert found.value.interval == wilson(sum(hits), 3)
    assert found.drop.interval is None, "of itself"
    (alike,) = scores(lambda *_: np.full(3, 0.5), [np.ones((3, 2))])
    assert alike.cells()[0].text == "0.5"


def test_samples_are_counted_by_their_images() -> None:
    judge = MetricJudge(lambda outputs, _: outputs["b"] > 0, "positive", {})
    judge.add([{"whole": np.ones((1, 2)), "b": np.ones(3)}], Batch(np.zeros((3, 1, 2, 2), np.float32), None))
    (found,) = judge.scores()
    assert (found.samples, found.value.value) == (3, 1)


def test_of_several_outputs_the_least_snr_is_told_with_its_name() -> None:
    judge = MetricJudge(lambda *_: 1.0, "one", {})
    large, small = np.full((3, 1), 1e6, np.float32), np.ones((3, 1), np.float32)
    judge.add([{"a": large, "b": small}, {"a": large, "b": small * 2}], Batch(np.zeros(0, np.float32), None))
    _, second = judge.scores()
    assert (second.snr_db, second.output) == (0, "b")
    assert second.cells()[2].text == "0.0 b"
    assert second.to_dict()["snr_output"] == "b"


def test_one_number_for_all_has_no_interval() -> None:
    first, second = scores(lambda outputs, _: float(outputs["a"].max()), [np.ones((3, 2)), np.zeros((3, 2))])
    assert (first.value.interval, second.lost) == (None, 1)
    assert second.cells()[0].text == "0"


def test_a_reference_that_is_the_artefact_is_asked_once_and_what_a_metric_writes_harms_nothing() -> None:
    calls = []

    def careless(outputs: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> float:
        found = float(outputs["a"].sum() + targets["boxes"].sum())
        calls.append(found)
        outputs["a"] *= 0
        targets["boxes"] *= 0
        return found

    judge = MetricJudge(careless, "careless", {"boxes": TARGETS["boxes"].copy()})
    same, other = ({"a": np.ones((3, 2)) * value} for value in (1, 2))
    judge.add([same, same, other], Batch(np.zeros(0, np.float32), None))
    first, second, third = judge.scores()
    assert calls == [6 + 15, 12 + 15]
    assert (first.value.value, second.value.value, third.value.value, third.lost) == (21, 21, 27, -6)
    assert (first.snr_db, third.snr_db) == (np.inf, 0)


def raised(error: BaseException) -> None:
    raise error


def test_ctrl_c_in_a_metric_is_no_failure_of_it() -> None:
    with pytest.raises(KeyboardInterrupt):
        scores(lambda outputs, targets: raised(KeyboardInterrupt()), [np.ones((3, 2))])


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (
            lambda outputs, targets: targets["labels"],
            r"failed: KeyError: 'labels' in test_metric.py, line \d+; .*boxes",
        ),
        (lambda outputs, targets: np.ones(2), r"shape \(2,\); it has .* one number, or one for each of 3 samples"),
        (lambda outputs, targets: np.array([0, 1, np.nan]), "NaN or infinity for sample 2"),
        (lambda outputs, targets: float("nan"), "NaN or infinity; return"),
        (lambda outputs, targets: {"map": 1}, r"returned dict \{'map': 1\}; it has to return one number"),
        (lambda outputs, targets: {}, r"returned dict \{\}; it has to return one number"),
        (lambda outputs, targets: None, "returned NoneType None; it has to return one number"),
        (lambda outputs, targets: "1", "returned str '1'; it has to return one number"),
        (lambda outputs, targets: [[1], [2, 3]], "returned list .*; it has to return one number"),
        (lambda outputs, targets: sys.exit(0), "failed: SystemExit: 0"),
        (lambda outputs, targets: raised(type("Odd", (BaseException,), {})("no")), "failed: Odd: no"),
    ],
)
def test_a_metric_that_fails_is_one_sentence(metric: Any, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        scores(metric, [np.ones((3, 2))])


def test_it_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_metric_of_a_test.py").write_text("import os\n\ndef near(outputs, targets):\n    return 1\n")
    assert load_metric("own_metric_of_a_test:near")({}, {}) == 1
    for spec, words in (
        ("own_metric_of_a_test:far", "has no function 'far'; it has near"),
        ("near", "is not package.module:function"),
        ("nowhere_at_all:near", "does not import"),
    ):
        with pytest.raises(RefusedError, match=words):
            load_metric(spec)


def test_the_working_directory_outlives_a_metric_that_changes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import os\nos.chdir('/')\ndef near(outputs, targets):\n    os.chdir('/')\n    return 1\n"
    (tmp_path / "own_metric_that_moves.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    metric = load_metric("own_metric_that_moves:near")
    assert Path.cwd() == tmp_path
    assert scores(metric, [np.ones((3, 2))])[0].value.value == 1
    assert Path.cwd() == tmp_path
