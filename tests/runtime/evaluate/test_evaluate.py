"""`python -m runtime.evaluate`: rows, reference, warnings and gates on small graphs made by hand."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from rich.console import Console

from gmconv.data import array_entries
from gmconv.errors import RefusedError
from gmconv.preprocessing import Preprocessing
from gmconv.splits import split_record
from runtime.artefact import open_artefact
from runtime.evaluate.__main__ import main
from runtime.evaluate.score import EvaluateOptions, evaluate, score_artefacts
from runtime.manifest import FileDigest, Manifest, TensorSpec, digest, read_manifest, sidecar

CLASSES = 8


def save(
    path: Path,
    *,
    swapped: tuple[int, int] = (0, 0),
    batch: int | str = "n",
    precision: str = "fp32",
    labels: tuple[str, ...] | None = None,
) -> Path:
    """A network whose logits are the eight pixels of its input, two of them swapped."""
    order = np.arange(CLASSES)
    order[list(swapped)] = order[list(swapped[::-1])]
    weight = np.eye(CLASSES, dtype=np.float32)[order]
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([-1, CLASSES]), "s")]
    nodes = [helper.make_node("Reshape", ["input", "s"], ["x"]), helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    shape = [batch, 1, 2, 4]
    values = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CLASSES])]
    graph = helper.make_graph(nodes, "g", values, out, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    spec, result = TensorSpec("input", "float32", tuple(shape)), TensorSpec("y", "float32", (batch, CLASSES))
    manifest = Manifest(
        artefact=digest(path, "onnx"), inputs=(spec,), outputs=(result,), precision=precision, labels=labels
    )
    sidecar(path).write_text(manifest.to_json())
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images per class; pixel k is the brightest of class k, pixel k + 1 the next."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), 10)
    pixels = random.random((len(labels), CLASSES), dtype=np.float32)
    pixels[np.arange(len(labels)), labels] = 3
    pixels[np.arange(len(labels)), (labels + 1) % CLASSES] = 2
    np.savez(tmp_path / "images.npz", input=pixels.reshape(-1, 1, 2, 4), labels=labels)
    return tmp_path / "images.npz"


def test_the_first_artefact_is_the_reference_and_confusions_are_counted(tmp_path: Path, images: Path) -> None:
    good, bad = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", swapped=(2, 5), precision="fp16")
    done = evaluate([good, bad], EvaluateOptions(images=images))
    assert done.reference == "a.onnx"
    assert done.samples == 80
    first, second = done.rows
    assert first.score.top1 is not None
    assert first.score.top1.hits == 80
    assert first.score.agreement.hits == 80
    assert second.score.agreement.hits == 60
    assert second.precision == "fp16"
    assert {
        (c.reference, c.artefact, c.count, c.reference_right, c.artefact_right) for c in second.score.confusions
    } == {
        (2, 5, 10, 10, 0),
        (5, 2, 10, 10, 0),
    }


def test_a_fixed_batch_sees_every_sample(tmp_path: Path, images: Path) -> None:
    done = evaluate([save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", batch=7)], EvaluateOptions(images=images))
    assert [row.score.samples for row in done.rows] == [80, 80]
    assert done.rows[1].score.agreement.hits == 80


def test_a_given_reference_is_not_a_row(tmp_path: Path, images: Path) -> None:
    reference, other = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", swapped=(0, 1))
    done = evaluate([other], EvaluateOptions(images=images, reference=reference))
    assert done.reference == "a.onnx"
    assert [row.artefact for row in done.rows] == ["b.onnx"]
    assert done.rows[0].score.agreement.hits == 60


def invoke(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done


def test_gates_exit_4_and_name_the_artefact(tmp_path: Path, images: Path) -> None:
    good, bad = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", swapped=(2, 5))
    done = invoke(good, bad, "--images", images, "--min-agreement", "75", "--max-drop", "30")
    assert "PASSED b.onnx: drop 25.00, at most 30; agreement 75.00 %, at least 75" in done.stdout
    assert "PASSED a.onnx" not in done.stdout
    own = next(line for line in done.stdout.splitlines() if line.startswith("a.onnx"))
    assert "exact" not in own, "the reference is not compared with itself"
    assert "0.00" not in own.split(), "nor does it lose points against itself"
    (tmp_path / "other").mkdir()
    again = save(tmp_path / "other" / "a.onnx")
    done = invoke(again, "--images", images, "--reference", good)
    assert "0.00" in done.stdout.split(), "another file of the same name does"
    done = invoke(good, bad, "--images", images, "--min-agreement", "75.1", code=4)
    assert "b.onnx: agrees with a.onnx on 75.00 % of 80 images" in done.stderr
    done = invoke(good, bad, "--images", images, "--max-top1-drop", "24", code=4)
    assert "b.onnx: top-1 is 25.00 points below a.onnx" in done.stderr
    done = invoke(good, bad, "--images", images, "--max-drop", "24", "--min-agreement", "76", code=4)
    assert (
        "top-1 is 25.00 points below a.onnx, 24 were allowed; agrees with a.onnx on 75.00 % of 80 images" in done.stderr
    )
    invoke(good, bad, "--images", images, "--max-top1-drop", "25")
    done = invoke(good, bad, "--images", images, "--max-drop", "24.999", "--min-agreement", "75.001", code=4)
    assert "top-1 is 25.00 points below a.onnx, 24.999 were allowed; agrees with a.onnx on 75.00 %" in done.stderr
    done = invoke(good, bad, "--images", images, "--max-drop", "25.001")
    assert "PASSED b.onnx: drop 25.00, at most 25.001" in done.stdout


@pytest.mark.parametrize(("allowed", "code"), [("24", 4), ("30", 0)])
def test_a_gate_is_in_report_index_and_json(allowed: str, code: int, tmp_path: Path, images: Path) -> None:
    files = [save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", swapped=(2, 5)), save(tmp_path / "c.onnx")]
    flags = ["--data", images, "--max-drop", allowed, "--min-agreement", "70"]
    invoke(*files, *flags, "--report", tmp_path / "gated.html", code=code)
    invoke(*files, "--data", images, "--report", tmp_path / "other.html")
    said = (
        "top-1 is 25.00 points below a.onnx, 24 were allowed"
        if code
        else "drop 25.00, at most 30; agreement 75.00 %, at least 70"
    )
    word = "FAILED" if code else "PASSED"
    page = (tmp_path / "gated.html").read_text()
    assert page.index("<h2>b.onnx: verdict") < page.index("<h2>c.onnx: verdict") < page.index("<h2>Summary")
    assert "a.onnx: verdict" not in page, "the reference is held to nothing"
    assert f">{word}</span>b.onnx: {said}</p>" in page
    assert ">PASSED</span>c.onnx: drop 0.00" in page
    assert f"<dd>drop at most {allowed}; agreement at least 70 %</dd>" in page
    index = (tmp_path / "index.html").read_text()
    assert f"<p>{word} b.onnx: {said}{'' if code else ' (and 1 more)'}, 2" in index
    assert "<p>a.onnx: top-1 % [95%] 100.00" in index, "without a gate"
    found = [row["verdict"] for row in json.loads(invoke(*files, *flags, "--json", code=code).stdout)["rows"]]
    limits = {"max_drop": float(allowed), "min_agreement": 70.0}
    assert found[:2] == [None, {"limits": limits, "passed": not code, "said": said}]
    assert found[2]["passed"]


def test_all_that_break_a_gate_are_named_and_what_keeps_to_it_too(tmp_path: Path, images: Path) -> None:
    pairs = {"a": (0, 0), "b": (0, 1), "c": (2, 5), "d": (0, 0)}
    files = [save(tmp_path / f"{name}.onnx", swapped=pair) for name, pair in pairs.items()]
    done = invoke(*files, "--data", images, "--max-drop", "1", code=4)
    assert "b.onnx: top-1 is" in done.stderr
    assert "c.onnx: top-1 is" in done.stderr
    assert "PASSED d.onnx: drop 0.00, at most 1" in done.stdout


def test_one_alone_is_held_to_what_it_was_made_from_and_never_to_itself(tmp_path: Path, images: Path) -> None:
    source, bad = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", swapped=(2, 5))
    live = tmp_path / "net.pt"  # a network that only its owner can name
    torch.save({"own.weight": torch.zeros(1)}, live)
    manifest = read_manifest(bad)
    chain = (digest(live, "checkpoint"), digest(source, "onnx"))
    sidecar(bad).write_text(replace(manifest, chain=chain).to_json())
    done = invoke(bad, "--data", images, "--max-drop", "24", code=4)
    assert "top-1 is 25.00 points below a.onnx" in done.stderr
    told = "net.pt, which b.onnx was made from, was not compared with"
    assert told in done.stderr
    other = save(tmp_path / "c.onnx")
    assert told in invoke(other, bad, "--data", images).stderr, "whose source it is, of several"
    live.rename(tmp_path / "other.pt")
    live.write_bytes(b"of another network")
    assert "net.pt" not in invoke(bad, "--data", images).stderr, "the name alone says nothing"
    (tmp_path / "other.pt").rename(live)
    source.unlink()
    assert told in invoke(bad, "--data", images).stderr
    for gate in ("--max-drop", "--min-agreement"):
        refused = invoke(bad, "--data", images, gate, "0", code=3).stderr
        assert f"would be compared with itself: give --reference FILE ({told}" in refused
    live.unlink()
    assert "the checkpoint or the fp32 file" in invoke(bad, "--data", images, "--max-drop", "0", code=3).stderr


def test_json_and_table_say_the_same(tmp_path: Path, images: Path) -> None:
    good, bad = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", swapped=(2, 5))
    parsed = json.loads(invoke(good, bad, "--images", images, "--json").stdout)
    assert parsed["rows"][1]["agreement"]["value"] == 0.75
    low, high = parsed["rows"][1]["agreement"]["interval95"]
    table = invoke(good, bad, "--images", images).stdout
    assert f"75.00 [{100 * low:.2f}, {100 * high:.2f}]" in table.replace("\n", "")
    assert "class 2 became class 5 10x (reference right 10, artefact right 0)" in table


def test_confusions_have_names_where_the_classes_have(tmp_path: Path, images: Path) -> None:
    names = tuple("abcdefgh")
    good, bad = (save(tmp_path / f"{n}.onnx", swapped=s, labels=names) for n, s in (("x", (0, 0)), ("y", (2, 5))))
    report = tmp_path / "report.html"
    assert "'c' became 'f' 10x" in invoke(good, bad, "--data", images, "--report", report).stdout
    assert "became &#39;f&#39; 10x" in report.read_text()
    assert "ends in .html" in invoke(good, "--data", images, "--report", good, code=2).stderr


@pytest.mark.parametrize("flags", [[], ["--data", "digits"]])
def test_digits_judge_only_what_was_trained_on_them(flags: list[str], tmp_path: Path) -> None:
    refused = invoke(save(tmp_path / "a.onnx"), *flags, code=3)
    assert "nothing says that it was trained on digits" in refused.stderr


def test_a_limit_is_drawn_by_seed(tmp_path: Path, images: Path) -> None:
    good = save(tmp_path / "a.onnx")
    done = evaluate([good], EvaluateOptions(images=images, limit=12, seed=1))
    assert done.samples == 12


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, images: Path) -> None:
    good = save(tmp_path / "a.onnx")
    with pytest.raises(RefusedError, match="no artefact given"):
        evaluate([])
    with pytest.raises(RefusedError, match="no such data"):
        evaluate([good], EvaluateOptions(images=tmp_path / "nothing"))
    with pytest.raises(RefusedError, match="no such file"):
        evaluate([tmp_path / "nothing.onnx"], EvaluateOptions(images=images))
    np.savez(tmp_path / "bare.npz", input=np.random.default_rng(0).random((4, 1, 2, 4), dtype=np.float32))
    invoke(good, "--images", tmp_path / "bare.npz", "--max-top1-drop", "1", code=3)


def test_a_network_that_gives_nan_has_no_accuracy(tmp_path: Path, images: Path) -> None:
    path = save(tmp_path / "a.onnx")
    model = onnx.load(path)
    spoiled = np.full((CLASSES, CLASSES), np.nan, np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(spoiled, "w"))
    onnx.save(model, path)
    sidecar(path).unlink()
    done = invoke(path, "--images", images, code=3)
    assert "NaN" in done.stderr


def save_pixels(path: Path, *, classes: int = 2, gain: float = 1.0) -> Path:
    """A network of two outputs: logits of 2 classes at half its input's size, and the input's mean."""
    weight = np.zeros((classes, 1, 2, 2), np.float32)
    weight[1] = gain
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([2, 3]), "axes")]
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["map"], strides=[2, 2]),
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
    ]
    values = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, 8, 8])]
    out = [
        helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["n", 1]),
        helper.make_tensor_value_info("map", TensorProto.FLOAT, ["n", classes, 4, 4]),
    ]
    graph = helper.make_graph(nodes, "g", values, out, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Six images of -1 and 1 in blocks of two pixels, masks of their sign, and their means."""
    signs = np.random.default_rng(0).random((6, 1, 4, 4)) < 0.5
    images = np.kron(np.where(signs, 1, -1), np.ones((1, 1, 2, 2))).astype(np.float32)
    found = {"masks": (images[:, 0] > 0).astype(np.uint8), "mean": images.mean((1, 2, 3))}
    np.savez(tmp_path / "masks.npz", input=images, **found)
    return tmp_path / "masks.npz"


@pytest.mark.parametrize("names", [("round",), ("round", "bar"), ("back", "round", "bar")])
def test_classes_of_masks_go_by_number_unless_there_is_a_name_for_each(
    tmp_path: Path, masks: Path, names: tuple[str, ...]
) -> None:
    """One name too few is a name on the wrong class: the background is easily forgotten."""
    path = save_pixels(tmp_path / "a.onnx")
    shape = ("batch", 1, 8, 8)
    outputs = (TensorSpec("mean", "float32", ("batch", 1)), TensorSpec("map", "float32", ("batch", 2, 4, 4)))
    inputs = (TensorSpec("input", "float32", shape),)
    manifest = Manifest(artefact=digest(path, "onnx"), inputs=inputs, outputs=outputs, labels=names)
    sidecar(path).write_text(manifest.to_json())
    done = invoke(path, "--data", masks, "--output", "map", "--reference", save_pixels(tmp_path / "b.onnx"))
    named = len(names) == 2
    assert ("'bar' " in done.stdout) == named
    assert ("class 1 " in done.stdout) != named
    said = f"output 'map' tells 2 classes apart, and the labels name {len(names)}: classes go by number here"
    assert (said in done.stderr) != named


def test_masks_judge_the_output_that_is_named(tmp_path: Path, masks: Path) -> None:
    good, bad = save_pixels(tmp_path / "a.onnx"), save_pixels(tmp_path / "b.onnx", gain=-1)
    table = invoke(good, bad, "--data", masks, "--output", "map").stdout
    assert "output 'map' of mean, map;" in table
    (warned,) = json.loads(invoke(good, bad, "--data", masks, "--output", "map", "--json").stdout)["warnings"]
    assert warned == "output 'map' is 4 x 4, the masks 8 x 8 (height x width): it was resized to them"
    assert "mIoU % [95%]" in table
    parsed = json.loads(invoke(good, bad, "--data", masks, "--output", "map", "--json").stdout)
    first, second = parsed["rows"]
    assert parsed["output"] == "map"
    assert first["accuracy"]["value"] > 0.75, "enlarged from half the size, only edges may differ"
    assert second["accuracy"]["value"] < 0.5
    assert second["drop"]["value"] > 0.5
    report = tmp_path / "report.html"
    done = invoke(good, bad, "--data", masks, "--output", "map", "--max-drop", "10", "--report", report, code=4)
    assert "b.onnx: mIoU is" in done.stderr
    assert "output 'map' alone was judged" in done.stderr
    assert "points below a.onnx" in done.stderr
    assert "worst first: class" in report.read_text()
    assert "masks judge logits" in invoke(good, "--data", masks, code=3).stderr, "the first output is (N, 1)"
    np.savez(tmp_path / "bare.npz", input=np.zeros((3, 1, 8, 8), np.float32))
    refused = invoke(good, bad, "--data", tmp_path / "bare.npz", "--output", "map", code=3).stderr
    assert "output 'map' has shape (3, 2, 4, 4)" in refused
    assert "--metric" in refused
    assert "there are mean, map" in invoke(good, "--data", masks, "--output", "maps", code=3).stderr


def save_two(path: Path, *, batch: int | str = "n", names: tuple[str, str] = ("shift", "image")) -> Path:
    """A network of two inputs: its logits are an image's eight pixels and a whole number for each."""
    shift, image = names
    nodes = [
        helper.make_node("Reshape", [image, "s"], ["x"]),
        helper.make_node("Cast", [shift], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(shift, TensorProto.INT64, [batch, CLASSES]),
        helper.make_tensor_value_info(image, TensorProto.FLOAT, [batch, 1, "h", "w"]),
    ]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CLASSES])]
    graph = helper.make_graph(nodes, "g", values, out, [numpy_helper.from_array(np.array([-1, CLASSES]), "s")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_several_inputs_come_from_the_arrays_of_their_names(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels, image = random.integers(0, CLASSES, 20), random.random((20, 1, 2, 4), dtype=np.float32)
    shift = np.eye(CLASSES, dtype=np.int64)[labels] * 2
    np.savez(tmp_path / "two.npz", image=image, shift=shift, labels=labels)
    paths = [save_two(tmp_path / "a.onnx"), save_two(tmp_path / "b.onnx", batch=3)]
    paths.append(save_two(tmp_path / "c.onnx", names=("first", "second")))
    found = evaluate(paths, EvaluateOptions(images=tmp_path / "two.npz", batch=7, limit=17))
    assert [row.score.top1.value for row in found.rows] == [1.0, 1.0, 1.0]
    np.savez(tmp_path / "one.npz", image=image, labels=labels)
    with pytest.raises(RefusedError, match=r"takes shift int64 \(n, 8\), image .* holds image .*, no 'shift'"):
        evaluate(paths, EvaluateOptions(images=tmp_path / "one.npz"))
    np.savez(tmp_path / "odd.npz", image=image, shift=shift[:, 1:], labels=labels)
    with pytest.raises(RefusedError, match=r"odd.npz: 'shift' is int64 \(20, 7\)"):
        evaluate(paths, EvaluateOptions(images=tmp_path / "odd.npz"))
    with pytest.raises(RefusedError, match=r"a\.onnx: takes shift .*, the reference input"):
        evaluate([save(tmp_path / "d.onnx"), paths[0]], EvaluateOptions(images=tmp_path / "one.npz"))


def test_an_own_metric_sees_every_output_and_every_array(
    tmp_path: Path, masks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metric_of_test_evaluate.py").write_text(
        "def close(outputs, targets):\n"
        "    assert outputs['map'].shape == (6, 2, 4, 4) and set(targets) == {'mean', 'masks'}\n"
        "    return 1 - abs(outputs['mean'][:, 0] - targets['mean'])\n"
        "def gained(outputs, targets):\n"
        "    return 0.5 if outputs['map'][:, 1].max() > 3 else 0.490788\n"
        "def wrong(outputs, targets):\n"
        "    return outputs['nope']\n"
        "def nan(outputs, targets):\n"
        "    return float('nan')\n"
    )
    path, other = save_pixels(tmp_path / "a.onnx"), save_pixels(tmp_path / "b.onnx", gain=0.5)
    found = json.loads(invoke(path, "--data", masks, "--metric", "metric_of_test_evaluate:close", "--json").stdout)
    assert found["rows"][0]["value"]["value"] == pytest.approx(1, abs=1e-6)
    assert "close (metric)" in invoke(path, "--data", masks, "--metric", "metric_of_test_evaluate:close").stdout
    refused = invoke(path, "--data", masks, "--metric", "metric_of_test_evaluate:far", code=3)
    assert "it has close" in refused.stderr
    for name, told in (("wrong", "--metric wrong failed: KeyError: 'nope' in metric_of_test"), ("nan", "--metric nan")):
        assert told in invoke(path, "--data", masks, "--metric", f"metric_of_test_evaluate:{name}", code=3).stderr
    invoke(path, "--data", masks, "--metric", "metric_of_test_evaluate:close", "--output", "map", code=2)
    done = [str(path), str(other), "--data", str(masks), "--metric", "metric_of_test_evaluate:gained", "--max-drop"]
    assert "b.onnx: gained is 0.009212 below a.onnx, 0.0001 were allowed" in invoke(*done, "0.0001", code=4).stderr
    assert "PASSED b.onnx: drop 0.009212, at most 0.01" in invoke(*done, "0.01").stdout


def test_what_training_held_out_is_judged_alone(tmp_path: Path, images: Path) -> None:
    path = save(tmp_path / "a.onnx")
    with np.load(images) as arrays:
        record = split_record("npz", array_entries(arrays["input"]), 0.25, 0)
    manifest = json.loads(sidecar(path).read_text())
    sidecar(path).write_text(json.dumps(manifest | {"dataset": record}))
    found = json.loads(invoke(path, "--data", images, "--json").stdout)
    assert (found["samples"], found["part"]) == (20, "held-out")
    assert "80 images of images.npz;" in invoke(path, "--data", images, "--split", "all").stdout
    assert "60 images of images.npz (training images)" in invoke(path, "--data", images, "--split", "train").stdout
    with np.load(images) as arrays:
        np.savez(images, input=arrays["input"][1:], labels=arrays["labels"][1:])
    assert "has changed since" in invoke(path, "--data", images, code=3).stderr
    assert "79 images" in invoke(path, "--data", images, "--split", "all").stdout


def test_without_labels_artefacts_are_compared_and_one_alone_is_refused(tmp_path: Path) -> None:
    good, bad = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", swapped=(2, 5))
    bare = tmp_path / "bare.npz"
    np.savez(bare, input=np.random.default_rng(0).random((40, 1, 2, 4), dtype=np.float32))
    refused = invoke(good, "--data", bare, code=3).stderr
    assert "a.onnx would be compared with itself: give labelled images, a --metric for what else is there" in refused
    done = invoke(good, bad, "--data", bare)
    assert "only agreement with the reference is measured" in done.stderr
    assert "agreement" in done.stdout
    assert "top-" not in done.stdout  # no column without a number


def test_folders_named_unlike_the_networks_classes_are_said(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", labels=tuple("abcdefgh"))
    preprocessing = {"size": [2, 4], "mean": [0.0], "std": [1.0], "channel_order": "L"}
    manifest = json.loads(sidecar(path).read_text())
    sidecar(path).write_text(json.dumps(manifest | {"preprocessing": preprocessing}))
    for index in range(CLASSES):
        (tmp_path / "data" / f"class{index}").mkdir(parents=True)
        Image.new("L", (4, 2)).save(tmp_path / "data" / f"class{index}" / "0.png")
    done = invoke(path, "--data", tmp_path / "data")
    assert "sub-folders class0, class1, class2, class3, class4 are no labels of the network; all" in done.stderr


@pytest.mark.parametrize("split", ["", "val/", "/val"])
def test_masks_without_their_image_are_said(tmp_path: Path, split: str) -> None:
    path = save_pixels(tmp_path / "a.onnx")
    manifest = Manifest(
        artefact=digest(path, "onnx"),
        inputs=(TensorSpec("input", "float32", ("n", 1, 8, 8)),),
        outputs=(TensorSpec("mean", "float32", ("n", 1)), TensorSpec("map", "float32", ("n", 2, 4, 4))),
        preprocessing=Preprocessing(size=(8, 8), mean=(0.0,), std=(1.0,), channel_order="L"),
    )
    sidecar(path).write_text(manifest.to_json())
    sides = [split + side if split.endswith("/") else side + split for side in ("images", "masks")]
    for side, names in zip(sides, ("ab", "abcd"), strict=True):
        for part in dict.fromkeys((side, side.replace("val", "train"))):
            (tmp_path / "data" / part).mkdir(parents=True)
        for name in names:
            Image.new("L", (8, 8), 1).save(tmp_path / "data" / side / f"{name}.png")
    flags = ("--data", tmp_path / "data", "--output", "map", "--json")
    told = f"data: 2 masks without an image ({sides[1]}/c.png, …): nothing is judged by them"
    assert told in json.loads(invoke(path, *flags).stdout)["warnings"]
    for name in "cd":
        (tmp_path / "data" / sides[1] / f"{name}.png").unlink()
    assert "without an image" not in invoke(path, *flags).stdout


def test_folders_in_decomposed_letters_are_the_networks_classes(tmp_path: Path) -> None:
    names = tuple("\u00e4\u00e9\u00f1\u00f6\u00fc\u00e5\u00e7\u00f4")
    path = save(tmp_path / "a.onnx", labels=names)
    other = save(tmp_path / "b.onnx", labels=tuple(unicodedata.normalize("NFD", name) for name in names))
    for file in (path, other):
        manifest = json.loads(sidecar(file).read_text())
        preprocessing = {"size": [2, 4], "mean": [0.0], "std": [1.0], "channel_order": "L"}
        sidecar(file).write_text(json.dumps(manifest | {"preprocessing": preprocessing}))
    data = folders(tmp_path / "data", [unicodedata.normalize("NFD", name) for name in names])
    assert "no labels of the network" not in invoke(path, other, "--data", data).stderr


def test_classes_without_images_are_named(tmp_path: Path, images: Path) -> None:
    path = save(tmp_path / "a.onnx", labels=tuple("abcdefgh"))
    with np.load(images) as arrays:
        some = np.isin(arrays["labels"], [2, 5], invert=True)
        np.savez(tmp_path / "some.npz", input=arrays["input"][some], labels=arrays["labels"][some])
    assert "some.npz has no images of c, f" in invoke(path, "--data", tmp_path / "some.npz").stderr
    assert "no images of" not in invoke(path, "--data", tmp_path / "some.npz", "--limit", "4").stderr
    assert "no images of" not in invoke(path, "--data", images).stderr


def test_preprocessing_that_contradicts_a_manifest_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx")
    preprocessing = {"size": [2, 4], "mean": [0.5], "std": [0.2], "channel_order": "L"}
    manifest = json.loads(sidecar(path).read_text())
    sidecar(path).write_text(json.dumps(manifest | {"preprocessing": preprocessing}))
    artefact = open_artefact(path)
    artefact.require_agreement({"mean": (0.5,), "std": 0.2})
    artefact.require_agreement(None)
    with pytest.raises(RefusedError, match=r"its manifest has mean .0\.5.*, not .0\.4"):
        artefact.require_agreement({"mean": (0.4,)})


def test_what_cannot_be_judged_names_the_data_or_the_artefact(tmp_path: Path) -> None:
    artefact = save(tmp_path / "a.onnx")
    images = np.random.default_rng(0).random((4, 1, 2, 4), dtype=np.float32)
    np.savez(tmp_path / "far.npz", input=images, labels=np.array([0, 1, 2, CLASSES]))
    with pytest.raises(RefusedError, match=r"^far\.npz: labels go from 0 to 8, the output judged has 8 classes"):
        evaluate([artefact], EvaluateOptions(images=tmp_path / "far.npz"))
    np.savez(tmp_path / "nan.npz", input=images * np.nan, labels=np.arange(4))
    with pytest.raises(RefusedError, match=r"nan\.npz: sample 0 holds NaN"):
        evaluate([artefact], EvaluateOptions(images=tmp_path / "nan.npz"))
    np.savez(tmp_path / "huge.npz", input=images * np.float32(np.inf), labels=np.arange(4))
    with pytest.raises(RefusedError, match=r"a\.onnx: output 'y' is NaN or infinite on huge\.npz"):
        evaluate([artefact], EvaluateOptions(images=tmp_path / "huge.npz"))


def test_a_part_that_nothing_knows_of_is_said(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((4, 1, 2, 4), dtype=np.float32)
    np.savez(tmp_path / "a.npz", input=images, labels=np.arange(4))
    options = EvaluateOptions(images=tmp_path / "a.npz", part="train")
    said = "nothing says which part of a.npz was trained on: all of it was taken"
    assert said in evaluate([save(tmp_path / "a.onnx")], options).warnings


def test_in_a_narrow_terminal_the_drop_is_the_last_number_to_go(tmp_path: Path, images: Path) -> None:
    files = [save(tmp_path / "a.onnx"), save(tmp_path / "a_long_name.int8.onnx", swapped=(2, 5), precision="fp16")]
    done = evaluate(files, EvaluateOptions(images=images))
    for width in (40, 60):
        with (console := Console(width=width, file=io.StringIO())).capture() as shown:
            done.show(console)
        assert "25.00" in shown.get(), f"points at {width} columns"


def folders(root: Path, names: Sequence[str]) -> Path:
    """A grey image in a folder for each name."""
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("L", (4, 2)).save(root / name / "0.png")
    return root


@pytest.mark.parametrize("count", [CLASSES - 1, CLASSES + 1])
def test_folders_of_a_nameless_network_are_taken_in_order_where_there_is_one_for_each_class(
    count: int, tmp_path: Path
) -> None:
    path, named = save(tmp_path / "a.onnx"), save(tmp_path / "named.onnx", labels=tuple("abcdefgh"))
    for file in (path, named):
        manifest = json.loads(sidecar(file).read_text())
        preprocessing = {"size": [2, 4], "mean": [0.0], "std": [1.0], "channel_order": "L"}
        sidecar(file).write_text(json.dumps(manifest | {"preprocessing": preprocessing}))
    data = folders(tmp_path / "data", "abcdefghi"[:count])
    said = invoke(path, "--data", data, code=3).stderr
    assert f"data: the network names no classes and has 8 outputs, and there are {count} sub-folders" in said
    assert "export it with --labels FILE" in said
    with pytest.raises(RefusedError, match=r"export it with labels=FILE"):
        score_artefacts(path, data=data)
    if count < CLASSES:  # by name, also where only the reference has names
        assert "names no classes" not in invoke(path, "--reference", named, "--data", data).stderr
    whole = folders(tmp_path / "whole", "abcdefgh")
    done = invoke(path, "--data", whole)
    assert "images of whole (stretched to 2 x 4);" in done.stdout
    warned = done.stderr
    assert warned.count("sub-folders in alphabetical order are taken as classes 0..7") == 1


def test_outputs_without_a_row_for_each_sample_stand_beside_the_judged_one(tmp_path: Path, images: Path) -> None:
    model = onnx.load(save(tmp_path / "a.onnx"))
    (tmp_path / "a.onnx.json").unlink()
    for name, kept, axes in (("mean", 0, [0, 1]), ("row", 1, [0])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(axes), f"{name}_axes"))
        model.graph.node.append(helper.make_node("ReduceMean", ["y", f"{name}_axes"], [name], keepdims=kept))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, CLASSES] if kept else []))
    onnx.save(model, tmp_path / "a.onnx")
    found = json.loads(invoke(tmp_path / "a.onnx", "--data", images, "--json").stdout)
    assert (found["output"], found["rows"][0]["top1"]["value"]) == ("y", 1)
    assert (
        "has 1 rows for 32 samples" in invoke(tmp_path / "a.onnx", "--data", images, "--output", "row", code=3).stderr
    )
    assert "labels judge logits" in invoke(tmp_path / "a.onnx", "--data", images, "--output", "mean", code=3).stderr


def test_what_was_exported_before_the_last_training_is_told(
    digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path
) -> None:
    again, report = tmp_path / "again.pt", tmp_path / "r.html"
    again.write_bytes(digits_checkpoint.read_bytes() + b"trained for longer")
    same = invoke(digits_checkpoint, digits_onnx, "--limit", 8)
    assert "this checkpoint" not in same.stderr
    own = read_manifest(digits_onnx).chain[0].sha256[:12]
    said = f"digits.onnx was made from digits.pt ({own}…), not from this checkpoint ("
    for arguments in ([again, digits_onnx], [digits_onnx, "--reference", again], [again, "--reference", digits_onnx]):
        found = invoke(*arguments, "--limit", 8, "--json", "--report", report, "--min-agreement", 90)
        assert f"warning: {said}" in " ".join(found.stderr.split())
        assert json.loads(found.stdout)["warnings"][0].startswith(said)
        assert said in report.read_text()


def test_two_files_of_two_checkpoints_are_told(tmp_path: Path, images: Path) -> None:
    files = [save(tmp_path / name) for name in ("new.onnx", "old.onnx")]
    for file, sha256 in zip(files, ("a" * 64, "b" * 64), strict=True):
        chain = (FileDigest("checkpoint", "net.pt", sha256, 1),)
        sidecar(file).write_text(replace(read_manifest(file), chain=chain).to_json())
    (told,) = evaluate(files, EvaluateOptions(images=images)).warnings
    assert told.endswith("not from this checkpoint (aaaaaaaaaaaa…, that of new.onnx)")
