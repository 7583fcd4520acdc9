"""export.triton's configuration: Triton batches, warms up and is told exactly what the artefact can do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from export.triton.__main__ import main
from export.triton.config import ServingOptions, check_config, from_text, model_config, to_text
from export.triton.interface import Interface, interface_of
from export.triton.write import write_repository
from gmconv.errors import RefusedError
from gmconv.preprocessing import Preprocessing
from runtime.manifest import ShapeRange, TensorSpec
from runtime.records import Export

from .triton_artefacts import make_engine, make_onnx, read_config, run, write_manifest


def test_a_fixed_batch_keeps_it_in_the_dims_and_is_not_batched(tmp_path: Path) -> None:
    entry = write_repository(make_onnx(tmp_path / "m.onnx", batch=4), tmp_path / "repo")
    config = read_config(entry.model)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [4, 3, 8, 8]
    assert [w.batch_size for w in config.model_warmup] == [1], "Triton skips samples of batch 0"
    assert list(config.model_warmup[0].inputs["input"].dims) == [4, 3, 8, 8]


def test_samples_that_meet_in_their_batch_are_not_batched(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "m.onnx")
    manifest = write_manifest(artefact, export=Export(opset=20, rows_meet=True))
    config = read_config(write_repository(artefact, tmp_path / "repo").model)
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, 3, 8, 8]
    with pytest.raises(RefusedError, match="depend on the others of its batch, so Triton cannot batch it"):
        model_config("m", interface_of(artefact, manifest), ServingOptions(max_batch=8))


def test_an_engine_is_batched_up_to_its_profile_on_a_gpu(tmp_path: Path) -> None:
    entry = write_repository(make_engine(tmp_path / "m.plan", high=16), tmp_path / "repo")
    config = read_config(entry.model)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 16)
    assert config.default_model_filename == "model.plan"
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert (entry.version / "model.plan").read_bytes() == b"engine"


def test_a_scalar_per_sample_is_written_with_a_reshape(tmp_path: Path) -> None:
    interface = Interface(
        source=tmp_path / "m.onnx",
        backend="onnxruntime",
        inputs=(TensorSpec("input", "float32", ("batch", 4)),),
        outputs=(TensorSpec("score", "float32", ("batch",)),),
    )
    config = model_config("m", interface, ServingOptions())
    assert list(config.output[0].dims) == [1]
    assert config.output[0].HasField("reshape")
    assert list(config.output[0].reshape.shape) == []
    check_config(from_text(to_text(config), tmp_path), interface)


def test_options_reach_the_configuration(tmp_path: Path) -> None:
    artefact = make_engine(tmp_path / "m.plan")
    result = run(
        artefact, "-o", tmp_path / "repo", "--name", "net", "--version", 3, "--max-batch", 8, "--instances", 2,
        "--gpus", "0,1", "--delay", 500, "--max-queue", 64, "--queue-timeout", 20000, "--policy", "specific:3,1",
        "--cuda-graphs", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["max_batch_size"] == 8
    config = read_config(tmp_path / "repo" / "net")
    group = config.instance_group[0]
    assert (group.count, list(group.gpus), config.dynamic_batching.max_queue_delay_microseconds) == (2, [0, 1], 500)
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 20000)
    assert list(config.version_policy.specific.versions) == [1, 3]
    assert [s.batch_size for s in config.optimization.cuda.graph_spec] == [1, 8]
    assert (tmp_path / "repo" / "net" / "3" / "model.plan").is_file()


def test_warm_up_of_dynamic_axes_takes_profile_preprocessing_or_shape(tmp_path: Path) -> None:
    dynamic = (TensorSpec("input", "float32", ("batch", 3, "height", "width")),)
    engine = make_engine(tmp_path / "m.plan", inputs=dynamic)
    entry = write_repository(engine, tmp_path / "repo", name="engine")
    assert list(read_config(entry.model).model_warmup[0].inputs["input"].dims) == [3, 8, 8]

    artefact = make_onnx(tmp_path / "m.onnx", size=(3, "height", "width"))
    write_manifest(artefact, inputs=dynamic, preprocessing=Preprocessing(size=(24, 20), mean=(0,) * 3, std=(1,) * 3))
    entry = write_repository(artefact, tmp_path / "repo", name="preprocessed")
    assert list(read_config(entry.model).model_warmup[0].inputs["input"].dims) == [3, 24, 20]

    write_manifest(artefact, inputs=dynamic)
    refused = run(artefact, "-o", tmp_path / "repo", "--name", "bare")
    assert refused.exit_code == 3
    assert "--shape input=3x224x224" in refused.output
    assert run(artefact, "-o", tmp_path / "repo", "--name", "bare", "--shape", "input=4x8x8").exit_code == 3
    assert run(artefact, "-o", tmp_path / "repo", "--name", "bare", "--shape", "input=3x16x16").exit_code == 0
    assert list(read_config(tmp_path / "repo" / "bare").model_warmup[0].inputs["input"].dims) == [3, 16, 16]


BATCHED = (TensorSpec("input", "float32", ("batch", 3, "height", "width")),)
LOGITS = (TensorSpec("logits", "float32", ("batch", 10)),)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (("batch", 8), [("count", 2)]),
        (("batch", 8), [("batch", 10), ("count", 2)]),
        (("height", "width", 3), [("classes",)]),
        (("batch", 8), [(10,)]),
        (("batch", 8), [()]),
    ],
    ids=["nonzero", "one of two outputs", "height", "fixed output", "scalar output"],
)
def test_an_axis_that_is_not_the_same_everywhere_is_not_the_batch(
    inputs: tuple[int | str, ...], outputs: list[tuple[int | str, ...]], tmp_path: Path
) -> None:
    interface = Interface(
        source=tmp_path / "m.onnx",
        backend="onnxruntime",
        inputs=(TensorSpec("input", "float32", inputs),),
        outputs=tuple(TensorSpec(f"out{i}", "int64", shape) for i, shape in enumerate(outputs)),
    )
    assert not interface.batched
    with pytest.raises(RefusedError, match="share no batch axis"):
        model_config("m", interface, ServingOptions(max_batch=8))
    if () in outputs:
        return
    config = model_config("m", interface, ServingOptions(warmup=False))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [d if isinstance(d, int) else -1 for d in inputs]


def test_unnamed_axes_of_a_foreign_file_are_batched_no_more_than_by_our_own_server(tmp_path: Path) -> None:
    from runtime.runners import open_runner
    from runtime.serve.models.version import make_signature
    from runtime.serve.settings import Settings

    for batch, batched in (("n", True), ("", False), (4, False)):
        artefact = make_onnx(tmp_path / "foreign.onnx", batch)
        with open_runner(artefact, "cpu") as runner:
            signature = make_signature(runner, None, Settings(source=artefact))
        assert interface_of(artefact, None).batched == bool(signature.max_rows) == batched


def test_the_reason_for_not_batching_is_said(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "m.onnx", "")
    result = run(artefact, "-o", tmp_path / "repo", "--shape", "input=1x3x8x8")
    assert result.exit_code == 0, result.output
    assert "requests run alone" in result.stdout
    assert "axis 0 is 'input_0' in 'input', 'logits_0' in 'logits'" in result.stderr


def profile_engine(path: Path, *profiles: tuple[int, int, int]) -> Path:
    """An engine with one profile per (smallest batch, largest batch, height and width of its images)."""
    ranges = tuple(
        {"input": ShapeRange((low, 3, side, side), ((low + high) // 2, 3, side, side), (high, 3, side, side))}
        for low, high, side in profiles
    )
    return make_engine(path, inputs=BATCHED, profiles=ranges)


def test_each_profile_is_warmed_up_at_its_own_shape_within_its_own_range(tmp_path: Path) -> None:
    entry = write_repository(profile_engine(tmp_path / "m.plan", (1, 4, 384), (1, 32, 224)), tmp_path / "repo")
    config = read_config(entry.model)
    # Triton batches requests of 384x384 up to max_batch_size too, and profile 0 ends at 4.
    assert config.max_batch_size == 4
    assert "profile 0" in str(entry.note)
    assert "32" in str(entry.note)
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert [(w.name, w.batch_size, list(w.inputs["input"].dims)) for w in config.model_warmup] == [
        ("profile 0, batch 1", 1, [3, 384, 384]),
        ("profile 0, batch 4", 4, [3, 384, 384]),
        ("profile 1, batch 1", 1, [3, 224, 224]),
        ("profile 1, batch 4", 4, [3, 224, 224]),
    ]


@pytest.mark.parametrize(
    ("profiles", "limit"),
    [
        ([(1, 1, 8), (16, 32, 8)], 1),
        ([(1, 8, 8), (9, 32, 8)], 32),
        ([(4, 32, 8), (1, 4, 8)], 32),
        ([(1, 16, 8)], 16),
        ([(1, 4, 8), (1, 2, 9)], 2),
    ],
    ids=["gap", "meeting", "overlapping", "one", "two shapes"],
)
def test_the_limit_is_the_batch_up_to_which_the_profiles_leave_no_gap(
    profiles: list[tuple[int, int, int]], limit: int, tmp_path: Path
) -> None:
    engine = profile_engine(tmp_path / "m.plan", *profiles)
    result = run(engine, "-o", tmp_path / "repo", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["max_batch_size"] == limit
    assert ("batches end at" in result.stderr) == (limit < max(high for _, high, _ in profiles))
    over = run(engine, "-o", tmp_path / "repo", "--name", "over", "--max-batch", limit + 1)
    assert over.exit_code == 3
    assert f"maximum {limit}" in over.output


def test_a_profile_that_does_not_start_at_one_is_refused_by_number(tmp_path: Path) -> None:
    engine = profile_engine(tmp_path / "m.plan", (1, 8, 224), (4, 8, 384))
    result = run(engine, "-o", tmp_path / "repo")
    assert result.exit_code == 3
    assert "profile 1 starts at batch 4" in result.output
    assert run(engine, "-o", tmp_path / "repo", "--max-batch", 0).exit_code == 0
    warmup = read_config(tmp_path / "repo" / "m").model_warmup
    assert [list(w.inputs["input"].dims) for w in warmup] == [[4, 3, 224, 224], [6, 3, 384, 384]]


def test_a_given_shape_warms_up_the_profile_that_holds_it(tmp_path: Path) -> None:
    engine = profile_engine(tmp_path / "m.plan", (1, 4, 384), (1, 32, 224))
    assert run(engine, "-o", tmp_path / "repo", "--shape", "input=3x224x224").exit_code == 0
    warmup = read_config(tmp_path / "repo" / "m").model_warmup
    assert [w.name for w in warmup] == ["profile 1, batch 1", "profile 1, batch 4"]
    result = run(engine, "-o", tmp_path / "repo", "--name", "other", "--shape", "input=3x300x300")
    assert result.exit_code == 3
    assert "no profile" in result.output


_RANGES = st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(1, 12), st.integers(0, 12))


@settings(max_examples=200, deadline=None)
@given(ranges=st.lists(_RANGES, min_size=1, max_size=4))
def test_every_batch_triton_may_form_and_every_warm_up_fits_a_profile(ranges: list[tuple[int, int, int, int]]) -> None:
    profiles = tuple(
        {"input": ShapeRange((low, side), (low + more // 2, side + grow // 2), (low + more, side + grow))}
        for low, more, side, grow in ranges
    )
    shape = TensorSpec("input", "float32", ("batch", "length"))
    interface = Interface(
        source=Path("m.plan"), backend="tensorrt", inputs=(shape,), outputs=(shape,), profiles=profiles
    )

    def runs(batch: int, side: int) -> bool:
        sides = [p["input"] for p in profiles]
        return any(r.min[0] <= batch <= r.max[0] and r.min[1] <= side <= r.max[1] for r in sides)

    if interface.batch_limit == 0:
        assert any(p["input"].min[0] > 1 for p in profiles)
        with pytest.raises(RefusedError, match="starts at batch"):
            model_config("m", interface, ServingOptions())
        return
    config = model_config("m", interface, ServingOptions())
    for profile in profiles:
        for side in range(profile["input"].min[1], profile["input"].max[1] + 1):
            assert all(runs(batch, side) for batch in range(1, config.max_batch_size + 1))
    assert config.model_warmup
    for sample in config.model_warmup:
        assert 1 <= sample.batch_size <= config.max_batch_size
        assert runs(sample.batch_size, sample.inputs["input"].dims[0])


def test_the_example_of_a_warm_up_shape_is_one_that_is_taken(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "m.onnx")
    refused = run(artefact, "-o", tmp_path / "repo", "--max-batch", 0)
    assert refused.exit_code == 3
    assert "--shape input=1x3x8x8" in refused.output
    result = run(artefact, "-o", tmp_path / "repo", "--max-batch", 0, "--shape", "input=1x3x8x8")
    assert result.exit_code == 0, result.output
    assert "requests run alone" in result.stdout
    assert [w.batch_size for w in read_config(tmp_path / "repo" / "m").model_warmup] == [1]


@pytest.mark.parametrize("scalar", ["input", "logits"])
def test_a_scalar_that_triton_cannot_take_is_refused(scalar: str, tmp_path: Path) -> None:
    specs = [TensorSpec(n, "float32", () if n == scalar else (4,)) for n in ("input", "logits")]
    interface = Interface(source=tmp_path / "m.onnx", backend="onnxruntime", inputs=(specs[0],), outputs=(specs[1],))
    with pytest.raises(RefusedError, match=f"'{scalar}' is a scalar.*shape \\[1\\]"):
        model_config("m", interface, ServingOptions())


def test_profiles_that_do_not_fit_the_inputs_are_refused(tmp_path: Path) -> None:
    flat = {"input": ShapeRange((1, 192), (4, 192), (8, 192))}
    for damaged in ({}, flat, {"other": flat["input"]}):
        result = run(make_engine(tmp_path / "m.plan", profiles=(damaged,)), "-o", tmp_path / "repo")
        assert result.exit_code == 3
        assert "profile 0 does not fit" in result.output


_DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bfloat16"]
_NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
_DIMS = st.lists(st.integers(1, 2**31), max_size=4)


@st.composite
def _specs(draw: st.DrawFn, batched: bool) -> tuple[TensorSpec, ...]:
    names = draw(st.lists(_NAMES, min_size=1, max_size=3, unique=True))
    lead: tuple[int | str, ...] = ("batch",) if batched else (draw(st.integers(1, 64)),)
    return tuple(TensorSpec(n, draw(st.sampled_from(_DTYPES)), (*lead, *draw(_DIMS))) for n in names)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), batched=st.booleans(), limit=st.integers(1, 4096))
def test_any_interface_survives_the_text_format_and_a_changed_one_is_caught(
    data: st.DataObject, batched: bool, limit: int
) -> None:
    inputs, outputs = data.draw(_specs(batched)), data.draw(_specs(batched))
    interface = Interface(source=Path("m.onnx"), backend="onnxruntime", inputs=inputs, outputs=outputs)
    options = ServingOptions(max_batch=limit if batched else None)
    config = from_text(to_text(model_config("m", interface, options)), Path("config.pbtxt"))
    check_config(config, interface)
    first = outputs[0]
    changed = data.draw(
        st.sampled_from(
            [
                replace(first, name=first.name + "x"),
                replace(first, dtype="int8" if first.dtype != "int8" else "float32"),
                replace(first, shape=(*first.shape, 7)),
            ]
        )
    )
    with pytest.raises(RefusedError):
        check_config(config, replace(interface, outputs=(changed, *outputs[1:])))


@given(text=st.text(max_size=40))
def test_odd_shape_arguments_are_usage_errors(text: str) -> None:
    result = CliRunner().invoke(main, ["m.onnx", "-o", "r", f"--shape=[{text}"])
    assert result.exit_code in (2, 3)
    assert result.exception is None or isinstance(result.exception, SystemExit)
