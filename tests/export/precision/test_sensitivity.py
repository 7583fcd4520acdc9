"""The search for the fewest layers to keep, on a network with one layer that int8 ruins."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import export
from export.precision.__main__ import main
from export.precision.converter import PrecisionConverter, PrecisionOptions
from export.precision.judging import Budget, EvaluationImages, Judge, Measurement, read_evaluation_images
from export.precision.plan import PrecisionPlan, read_plan, write_plan
from export.precision.search import (
    SensitivitySearch,
    make_plan,
    pareto,
    search_precision,
)
from gmconv.errors import ParityError, RefusedError
from gmconv.preprocessing import Preprocessing
from runtime.artefact import Facts
from runtime.report import Search
from runtime.report.render import render

Network = Callable[..., onnx.ModelProto]


@pytest.fixture
def search(network: Network, npz: Path, images: NDArray[np.float32]) -> SensitivitySearch:
    """`block.conv1` gets one huge weight per channel: its per-channel scale rounds the others to zero."""
    random = np.random.default_rng(5)
    spoiled = (random.standard_normal((8, 8, 3, 3)) * 0.1).astype(np.float32)
    spoiled[:, 0, 0, 0] = 60
    model = network(edit={"block.conv1.weight": spoiled})
    converter = PrecisionConverter(model, PrecisionOptions(calibration=npz, calibration_method="minmax"))
    return SensitivitySearch(converter, "int8", EvaluationImages("images", (images,), None))


def test_the_spoiled_layer_is_the_most_sensitive(search: SensitivitySearch) -> None:
    alone = search.sensitivities(Budget(min_snr=10))
    assert next(iter(alone)) == "block.conv1"
    assert set(alone) == {"conv1", "block.conv1", "down", "fc"}
    ratios = [found.snr_db for found in alone.values()]
    assert ratios == sorted(ratios)
    assert all(len(found.kept) == 3 for found in alone.values())


def test_the_fewest_layers_are_kept_that_hold_the_budget(search: SensitivitySearch) -> None:
    everything = search._try([])
    alone = list(search.sensitivities(Budget(min_snr=0)))
    one = search._try(alone[:1])
    assert one.snr_db > everything.snr_db + 3
    budget = Budget(min_snr=(everything.snr_db + one.snr_db) / 2)
    chosen = search.fewest_kept(budget, alone)
    assert chosen.kept == ("block.conv1",)
    # None is kept where none is needed.
    assert search.fewest_kept(Budget(min_snr=everything.snr_db - 1), alone).kept == ()


def test_every_kept_layer_is_needed(search: SensitivitySearch) -> None:
    """Whatever order it was told, no single kept layer can be given back within the budget."""
    alone = list(search.sensitivities(Budget(min_snr=0)))
    target = Budget(min_snr=search._try(alone[:2]).snr_db - 0.1)
    chosen = search.fewest_kept(target, alone[::-1])
    assert target.holds(chosen)
    for name in chosen.kept:
        assert not target.holds(search._try([other for other in chosen.kept if other != name])), name


def test_a_budget_that_cannot_be_met_says_what_was_best(search: SensitivitySearch) -> None:
    with pytest.raises(ParityError, match=r"no mix of int8 and fp16 layers reaches 200 dB: the best keeps 3 of 4"):
        search.fewest_kept(Budget(min_snr=200), list(search.sensitivities(Budget(min_snr=200))))


def test_a_plan_reproduces_the_choice(search: SensitivitySearch, tmp_path: Path, npz: Path) -> None:
    chosen = search._try(["block.conv1"])
    plan = make_plan(search, Budget(min_snr=1), chosen, "0" * 64)
    write_plan(tmp_path / "plan.json", plan)
    again = read_plan(tmp_path / "plan.json")
    assert again == plan
    expected, _ = search.converter.quantize("int8", set(), {"node_block"})
    options = PrecisionOptions(calibration=npz).follow(again)
    graph, audit = PrecisionConverter(search.converter.model, options).convert("int8")
    assert graph.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    assert {layer.layer: layer.precision for layer in audit.layers}["block.conv1"] == "fp16"


def test_the_search_is_one_function_whose_result_prints_as_tables(
    search: SensitivitySearch, npz: Path, tmp_path: Path
) -> None:
    onnx.save(search.converter.model, tmp_path / "net.onnx")
    found = search_precision(
        str(tmp_path / "net.onnx"), "int8", Budget(min_snr=0), search.converter.options, images=str(npz), limit=8
    )
    assert found.chosen.kept == ()
    assert next(iter(found.alone)) == "block.conv1"
    assert "each layer quantized alone" in repr(found)
    assert repr(found).endswith(f"agreement with fp32 (no classes known) on 8 images of {npz.name}")
    points, front, alone = found.sections()
    assert isinstance(points, Search)
    assert [point.chosen for point in points.tried].count(True) == 1
    assert points.y == "SNR [dB]"
    html = render("t", [points, front, alone])
    assert "SNR [dB] over layers kept" in html
    assert html.count("block.conv1") == 1


def test_layers_without_an_8_bit_kernel_are_no_part_of_a_search(npz: Path, tmp_path: Path) -> None:
    """A transposed convolution is left in fp16, as it is without a search; others are searched."""
    weights = [np.random.default_rng(i).standard_normal((4, 3, 3, 3)).astype(np.float32) / 6 for i in (0, 1)]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "a.weight"], ["y"], name="a", pads=[1, 1, 1, 1]),
            helper.make_node("ConvTranspose", ["y", "b.weight"], ["z"], name="b", pads=[1, 1, 1, 1]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, ("a.weight", "b.weight"), strict=True)],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "net.onnx"
    )
    found = search_precision(tmp_path / "net.onnx", "int8", min_snr=10.0, images=npz, limit=8)
    assert list(found.alone) == ["a"]
    both = search_precision(tmp_path / "net.onnx", "int8", min_snr=10.0, images=npz, limit=8, target="cpu")
    assert set(both.alone) == {"a", "b"}


def test_the_images_of_a_search_calibrate_too_unless_others_are_named(
    search: SensitivitySearch, npz: Path, tmp_path: Path
) -> None:
    onnx.save(search.converter.model, tmp_path / "net.onnx")
    found = search_precision(tmp_path / "net.onnx", "int8", Budget(min_snr=0), images=npz, limit=8)
    assert found.plan.calibration is not None
    assert found.plan.calibration.source == npz.name
    other = PrecisionOptions(calibration=tmp_path / "other.npz")
    with pytest.raises(RefusedError, match=r"other\.npz: no such"):
        search_precision(tmp_path / "net.onnx", "int8", Budget(min_snr=0), other, images=npz)


def test_a_search_without_images_says_so_in_python_and_to_a_shell_in_flags(
    search: SensitivitySearch, tmp_path: Path
) -> None:
    onnx.save(search.converter.model, tmp_path / "net.onnx")
    with pytest.raises(RefusedError, match="needs images to measure on: give data=DIR or data='digits'$"):
        export.search_precision(tmp_path / "net.onnx", "int8", Budget(min_snr=0))
    asked = [str(tmp_path / "net.onnx"), "--auto-precision", "int8", "--min-snr", "0"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 3
    assert "give --data DIR or --data digits" in done.output


def test_a_plan_with_other_images_or_another_network_is_refused(
    search: SensitivitySearch, network: Network, npz: Path, tmp_path: Path
) -> None:
    plan = make_plan(search, Budget(min_snr=1), search._try(["block.conv1"]), "")
    other = np.random.default_rng(9).random((40, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "other.npz", input=other)
    options = PrecisionOptions(calibration=tmp_path / "other.npz").follow(plan)
    with pytest.raises(RefusedError, match="made with other calibration images"):
        PrecisionConverter(search.converter.model, options).convert("int8")
    lost = PrecisionPlan(precision="int8", keep={"layer4.conv1": "fp16"})
    with pytest.raises(RefusedError, match=r"the plan keeps layer4.conv1, which this network has not"):
        PrecisionConverter(network(), PrecisionOptions(calibration=npz).follow(lost)).convert("int8")
    with pytest.raises(RefusedError, match="the plan is for int8, not for fp8"):
        PrecisionConverter(network(), PrecisionOptions(calibration=npz).follow(lost)).convert("fp8")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"precision": "int4", "keep": {}}', '{"precision":"int8","keep":{"a":"x"}}']
)
def test_a_damaged_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(RefusedError, match=r"plan.json: not a precision plan"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"precision":"int8","keep":{},"schema":"x/v9"}')
    with pytest.raises(RefusedError, match="schema 'x/v9'"):
        read_plan(tmp_path / "plan.json")


def test_the_pareto_front_drops_what_is_worse_in_everything() -> None:
    def found(kept: int, drop: float, snr: float) -> Measurement:
        names = tuple(str(k) for k in range(kept))
        return Measurement(
            kept=names,
            top1=1 - drop / 100,
            top1_drop=drop,
            snr_db=snr,
            output="y",
            ratios={},
            size_ratio=1,
            latency_ms=1,
        )

    front = pareto([found(0, 2, 20), found(1, 3, 15), found(2, 1, 18), found(3, 1, 30)])
    assert [(len(m.kept), m.top1_drop) for m in front] == [(0, 2), (2, 1), (3, 1)]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """Two convolutions that score three classes in each of 8 x 8 pixels."""
    random = np.random.default_rng(0)
    shapes = {"a": (8, 3, 3, 3), "b": (3, 8, 3, 3)}
    weights = [numpy_helper.from_array(random.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["input", "a"], ["x"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "b"], ["y"], "last", pads=[1, 1, 1, 1]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3, 8, 8]) for n in ("input", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "d.onnx")
    return tmp_path / "d.onnx"


def test_pixels_are_judged_one_by_one_by_their_masks_where_there_are_some(dense: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(1).standard_normal((6, 3, 8, 8)).astype(np.float32)
    scores = ort.InferenceSession(dense, providers=["CPUExecutionProvider"]).run(None, {"input": images})[0]
    np.savez(tmp_path / "bare.npz", images=images)
    found = search_precision(dense, "int8", Budget(max_top1_drop=5), images=tmp_path / "bare.npz")
    assert "agreement of pixels with fp32 (no classes known) on 6 images" in repr(found)
    assert "pixel accuracy [%]" in repr(found)
    assert found.chosen.kept == (), "of 384 pixels few change, though in most images the largest of 192 scores moves"
    masks = scores.argmax(1)
    masks[:, 0] = 255  # which nobody labelled
    masks[:, 1] = (masks[:, 1] + 1) % 3
    np.savez(tmp_path / "masks.npz", images=images, labels=masks)
    judge = search_precision(dense, "int8", Budget(min_snr=0), images=tmp_path / "masks.npz").judge
    assert judge.title.startswith("pixel accuracy on 6 images")
    assert judge.before == pytest.approx(6 / 7)


def test_a_budget_of_top_1_needs_scores_of_classes(dense: Path, tmp_path: Path) -> None:
    model = onnx.load(dense)
    model.graph.node.append(helper.make_node("ReduceMean", ["y"], ["z"], keepdims=1))
    model.graph.node[-1].input.append("axes")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 1, 8, 8]))
    onnx.save(model, dense)
    np.savez(tmp_path / "bare.npz", images=np.random.default_rng(1).standard_normal((6, 3, 8, 8)).astype(np.float32))
    with pytest.raises(RefusedError, match=r"output 'z' is \(6, 1, 8, 8\); min_snr=DB judges any"):
        search_precision(dense, "int8", max_top1_drop=1, images=tmp_path / "bare.npz")
    found = search_precision(dense, "int8", min_snr=0, images=tmp_path / "bare.npz")
    assert "SNR alone on 6 images" in repr(found)
    assert found.chosen.top1 is None


def test_classes_are_those_of_the_network(images: NDArray[np.float32]) -> None:
    """Of a nameless one its folders in order, where there is one for each output, and never a class that it has not."""
    classes = np.arange(len(images)) % 3
    logits = np.eye(4, dtype=np.float32)[classes]
    with pytest.raises(RefusedError, match=r"val: the network names no classes and has 4 outputs, .* 3 sub-folders"):
        Judge({"y": logits}, EvaluationImages("val", (images,), classes, ("a", "b", "c")))
    judge = Judge({"y": logits}, EvaluationImages("val", (images,), classes, ("a", "b", "c", "d")))
    assert judge.title.endswith("val (its sub-folders in alphabetical order are taken as classes 0..3)")
    with pytest.raises(RefusedError, match=r"val: labels go from 0 to 2, the network has 2 classes"):
        Judge({"y": logits[:, :2]}, EvaluationImages("val", (images,), classes))


def test_folders_of_a_search_are_known_by_the_networks_names(network: Network, tmp_path: Path) -> None:
    for name in ("cat", "fish"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
    plain = Preprocessing(size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    facts = Facts(preprocessing=plain, labels=("bird", "cat", "dog", "fish"))
    found = read_evaluation_images(tmp_path, PrecisionConverter(network(), PrecisionOptions(), facts=facts), 8)
    assert found.classes is not None
    assert found.classes.tolist() == [1, 3]
    assert not found.folders


@pytest.fixture
def two(dense: Path, tmp_path: Path) -> tuple[Path, Path]:
    """`dense` with a second output, where one weight hides another in 8 bits, and images for it."""
    model = onnx.load(dense)
    kernel = np.zeros((1, 3, 1, 1), np.float32)
    kernel[0, :2, 0, 0] = 100, 0.3
    model.graph.initializer.append(numpy_helper.from_array(kernel, "fine.weight"))
    model.graph.node.append(helper.make_node("Conv", ["input", "fine.weight"], ["fine"], name="fine"))
    model.graph.output.append(helper.make_tensor_value_info("fine", TensorProto.FLOAT, ["n", 1, 8, 8]))
    onnx.save(model, dense)
    images = np.random.default_rng(1).standard_normal((6, 3, 8, 8)).astype(np.float32)
    images[:, 0] = 0
    np.savez(tmp_path / "bare.npz", images=images)
    return dense, tmp_path / "bare.npz"


def test_of_several_outputs_the_worst_snr_counts(two: tuple[Path, Path], tmp_path: Path) -> None:
    model, images = two
    found = search_precision(model, "int8", min_snr=20, images=images)
    everything = next(one for one in found.tried if not one.kept)
    assert everything.output == "fine"
    assert everything.snr_db == everything.ratios["fine"] < 20 < everything.ratios["y"]
    assert found.chosen.kept == ("fine",)
    assert "; the least SNR of 2 outputs alone decides; SNR by output, dB: y " in " ".join(repr(found).split())
    assert re.search(r"\d fine ", repr(found)), "tables name the worst output"
    assert everything.to_dict()["ratios"].keys() == {"y", "fine"}
    with pytest.raises(ParityError, match=r"dB \(output '(fine|y)'\); .*ask for less"):
        search_precision(model, "int8", min_snr=300, images=images)


def test_the_output_that_decides_is_named(two: tuple[Path, Path]) -> None:
    model, images = two
    for asked, said in (
        ({"max_top1_drop": 50}, "accuracy of output 'y' alone decides"),
        ({"max_top1_drop": 50, "min_snr": -50}, "accuracy of output 'y' and the least SNR of 2 outputs decide"),
        ({"min_snr": 20, "judge_output": "y"}, "SNR of output 'y' alone decides"),
    ):
        found = search_precision(model, "int8", images=images, **asked)
        assert found.chosen.kept == ()
        assert f"; {said}; SNR by output, dB: y " in " ".join(repr(found).split())
    with pytest.raises(RefusedError, match=r"no output 'z' \(judge_output\); there are y, fine"):
        search_precision(model, "int8", min_snr=0, images=images, judge_output="z")
    with pytest.raises(RefusedError, match=r"output 'fine' is \(6, 1, 8, 8\)"):
        search_precision(model, "int8", max_top1_drop=1, images=images, judge_output="fine")


def test_outputs_that_are_constant_or_not_finite(images: NDArray[np.float32]) -> None:
    given = EvaluationImages("val", (images,), None)
    judge = Judge({"zero": np.zeros(2, np.float32), "class": np.array([3, 4])}, given)
    worse = {"zero": np.ones(2, np.float32), "class": np.array([3, 4, 5])}
    assert judge.ratios(worse) == {"zero": -np.inf, "class": -np.inf}
    assert judge.ratios({"zero": np.array([np.nan, 0]), "class": np.array([3, 4])}) == {
        "zero": -np.inf,
        "class": np.inf,
    }
    with pytest.raises(RefusedError, match="output 'y' of the fp32 graph is NaN or infinite on val"):
        Judge({"y": np.array([np.nan])}, given)
    beside = Judge({"y": np.array([np.nan]), "z": np.ones(2)}, given, "z")
    assert beside.ratios({"y": np.array([np.nan]), "z": np.ones(2)}) == {"y": -np.inf, "z": np.inf}


def test_the_command_names_the_output_that_decides(two: tuple[Path, Path]) -> None:
    model, images = two
    asked = [str(model), "--auto-precision", "int8", "--min-snr", "20", "--data", str(images), "-q", "--no-verify"]
    done = CliRunner().invoke(main, [*asked, "--judge-output", "y"])
    assert done.exit_code == 0, done.output
    assert "SNR of output 'y' alone decides; SNR by output, dB: y " in " ".join(done.output.split())
    done = CliRunner().invoke(main, [str(model), "--to", "int8", "--judge-output", "y"])
    assert done.exit_code == 2
    assert "go with --auto-precision" in done.output


def test_fewer_images_than_a_fixed_batch_are_refused(network: Network, npz: Path, tmp_path: Path) -> None:
    onnx.save(network(batch=64), tmp_path / "net.onnx")
    with pytest.raises(RefusedError, match=r"images\.npz: 40 images, and the graph takes 64 at a time; give more"):
        search_precision(tmp_path / "net.onnx", "int8", min_snr=0, images=npz)
    with pytest.raises(RefusedError, match=r"0 calibration image\(s\) read, 64 at a time, as the graph takes them"):
        export.convert_precision(tmp_path / "net.onnx", "int8", data=npz)


def test_labels_of_another_output_are_passed_over_where_no_accuracy_is_asked_for(images: NDArray[np.float32]) -> None:
    random = np.random.default_rng(0)
    outputs = {"class": random.standard_normal((40, 4)), "box": random.standard_normal((40, 2))}
    given = EvaluationImages("val", (images,), np.arange(40) % 4)
    with pytest.raises(RefusedError, match="val: labels go from 0 to 3, output 'box' has 2 classes"):
        Judge(outputs, given, "box")
    assert Judge(outputs, given, "box", strict=False).title == (
        "agreement with fp32 (classes (40,) do not fit its (40, 2)) on 40 images of val"
    )


def test_boxes_beside_the_images_are_no_matter_to_a_ratio(
    search: SensitivitySearch, npz: Path, images: NDArray[np.float32], tmp_path: Path
) -> None:
    onnx.save(search.converter.model, tmp_path / "net.onnx")
    boxes = tmp_path / "boxes.npz"
    np.savez(boxes, images=images, y=np.zeros((len(images), 4), np.float32))
    options = PrecisionOptions(calibration=npz)
    found = search_precision(tmp_path / "net.onnx", "int8", Budget(min_snr=0), options, images=boxes, limit=8)
    assert repr(found).endswith("agreement with fp32 (no classes known) on 8 images of boxes.npz")
    with pytest.raises(RefusedError, match="'y' is float32 .*one integer for each") as no:
        search_precision(tmp_path / "net.onnx", "int8", Budget(max_top1_drop=1), options, images=boxes)
    assert "--metric" not in no.value.message
