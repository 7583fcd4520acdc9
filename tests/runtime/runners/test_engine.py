"""One deserialized engine for several runners, padded batches, page-locked staging, and TensorRT-RTX's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorrt_rtx

from gmconv.errors import UnavailableError
from runtime import cuda, trt
from runtime.runners.runtime_cache import RuntimeCache


def images(batch: int, start: float = 0.0) -> dict[str, np.ndarray[Any, Any]]:
    return {"input": np.arange(start, start + batch * 4, dtype=np.float32).reshape(batch, 4)}


def right(outputs: dict[str, Any], feeds: dict[str, Any]) -> bool:
    return np.array_equal(outputs["logits"], feeds["input"][:, :2] * 2)


def test_runners_share_one_engine_and_the_last_one_to_leave_closes_it(bench: Any) -> None:
    first = bench.open()
    second = first.share()
    assert bench.kinds().count("deserialize") == 1
    assert len(bench.engine.contexts) == 2
    first.run(images(2))
    first.close()
    assert right(second.run(images(3)), images(3))
    assert not second._engine.closed
    second.close()
    second.close()
    assert second._engine.closed
    assert +bench.device.open == {}
    assert bench.device.bytes_at == {}


def test_batches_are_padded_to_sizes_that_keep_their_contexts_and_graphs(bench: Any) -> None:
    with bench.open(cuda_graph=True, batches=(1, 4, 16, 64)) as runner:
        assert runner.batches == (1, 4, 16), "no profile takes 64"
        assert len(bench.engine.contexts) == 3
        runner.warm_up()
        bench.log.clear()
        for batch in (3, 1, 9, 4, 2, 16, 1):
            outputs = runner.run(images(batch, start=float(batch)))
            assert outputs["logits"].shape == (batch, 2)
            assert right(outputs, images(batch, start=float(batch)))
        kinds = bench.kinds()
        assert kinds.count("launch") == 7, "every batch is one launch"
        assert not {"capture", "shape", "profile", "allocate", "graph closed"} & set(kinds)


@pytest.mark.parametrize(
    ("profiles", "sizes"),
    [
        ([(1, 8, 32)], (1, 2, 4, 8, 16, 32)),
        ([(1, 6, 12)], (1, 2, 4, 6, 8, 12)),
        ([(1, 32, 512)], (1, 4, 16, 32, 64, 256, 512)),
        ([(3, 3, 3)], (3,)),
        ([(1, 2, 4), (4, 8, 16)], (1, 2, 4, 8, 16)),
    ],
)
def test_the_sizes_for_serving_are_few(bench: Any, profiles: list[tuple[int, ...]], sizes: tuple[int, ...]) -> None:
    bench.engine.profiles[:] = profiles
    bench.engine.double.num_optimization_profiles = len(profiles)
    with bench.open(batches="auto") as runner:
        assert runner.batches == sizes


def test_a_batch_larger_than_the_last_size_runs_as_it_is(bench: Any) -> None:
    with bench.open(batches=(4,)) as runner:
        assert right(runner.run(images(16)), images(16))


def test_what_is_gathered_in_place_is_not_copied_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with bench.open(cuda_graph=False, batches=(4,)) as runner:
        staged = runner.stage({"input": (3, 4)})
        assert staged["input"].shape == (3, 4)
        staged["input"][...] = images(3)["input"]
        monkeypatch.setattr(np, "copyto", mock.Mock(side_effect=AssertionError("copied on the host")))
        assert right(runner.run(staged), images(3))
        with pytest.raises(AssertionError, match="copied on the host"):
            runner.run(images(3))


@pytest.fixture
def rtx(bench: Any, manifest: Callable[..., Any]) -> Any:
    """The bench as TensorRT-RTX: `configs` are the runtime configs made, `kernels` what the cache serializes."""
    manifest(bench.path, build={"flavor": "rtx"}, versions={"tensorrt_rtx": "10.13.3.9"}, device=None)
    bench.configs, bench.kernels, bench.fits = [], b"kernels", True
    bench.caches = []

    def create_cache() -> Any:
        cache = mock.create_autospec(tensorrt_rtx.IRuntimeCache, instance=True, spec_set=True)
        cache.serialize.side_effect = lambda: bench.device.called("serialize") or bench.kernels
        cache.deserialize.side_effect = lambda data: bench.device.called("deserialize") or bench.fits
        bench.caches.append(cache)
        return cache

    def create_config() -> Any:
        config = mock.create_autospec(tensorrt_rtx.IRuntimeConfig, instance=True, spec_set=True)
        config.create_runtime_cache.side_effect = create_cache
        bench.configs.append(config)
        return config

    bench.engine.double.create_runtime_config.side_effect = create_config
    return bench


def test_a_server_compiles_in_the_background_and_keeps_the_kernels_beside_the_engine(rtx: Any) -> None:
    kept = RuntimeCache(rtx.path, keep=True).path
    with rtx.open(lazy=True, batches=(1, 4)) as runner:
        twin = runner.share()
        strategies = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
        assert {c.dynamic_shapes_kernel_specialization_strategy for c in rtx.configs} == {strategies.LAZY}
        (cache,) = rtx.caches
        assert all(config.set_runtime_cache.call_args.args == (cache,) for config in rtx.configs), "one for all"
        assert [lane.config for lane in (*runner._runs, *twin._runs)] == rtx.configs, (
            "each lives as long as its context"
        )
        cache.deserialize.assert_not_called()
        runner.warm_up()
        assert kept.read_bytes() == b"kernels"
        rtx.kernels = b"more kernels"
        twin.close()
    assert kept.read_bytes() == b"more kernels", "what was compiled since"
    with rtx.open(lazy=True):
        assert rtx.caches[-1].deserialize.call_args.args == (b"more kernels",)


def test_the_kernels_of_a_linked_engine_lie_beside_the_engine(tmp_path: Path) -> None:
    real, link = tmp_path / "cache" / "model.plan", tmp_path / "served" / "net.plan"
    for path in (real, link):
        path.parent.mkdir()
    real.write_bytes(b"engine")
    link.symlink_to(real)
    assert RuntimeCache(link, keep=True).path == real.with_name("model.plan.kernels")


def test_parity_and_benchmark_compile_at_once_no_kernel_twice_and_write_nothing(rtx: Any) -> None:
    RuntimeCache(rtx.path, keep=True).path.write_bytes(b"a server's")
    with rtx.open() as runner:
        runner.warm_up()
        runner.queries(images(2), 2, transfers=False, cuda_graph=True, streams=2)
    eager = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert {c.dynamic_shapes_kernel_specialization_strategy for c in rtx.configs} == {eager}
    (cache,) = rtx.caches
    assert len(rtx.configs) == 5, "a context for each query, and one to run"
    assert all(config.set_runtime_cache.call_args.args == (cache,) for config in rtx.configs)
    cache.deserialize.assert_not_called()
    assert RuntimeCache(rtx.path, keep=True).path.read_bytes() == b"a server's"


@pytest.mark.parametrize("damage", ["cut short", "another driver's", "no digest"])
def test_kernels_that_do_not_fit_are_compiled_again(rtx: Any, damage: str) -> None:
    with rtx.open(lazy=True):
        pass
    kept = RuntimeCache(rtx.path, keep=True).path
    if damage == "cut short":
        kept.write_bytes(b"kern")
    elif damage == "no digest":
        kept.with_name(kept.name + ".sha256").unlink()
    else:
        rtx.fits = False
    with rtx.open(lazy=True) as runner:
        assert right(runner.run(images(2)), images(2))
        assert rtx.caches[-1].deserialize.called == (damage == "another driver's")
    assert kept.read_bytes() == b"kernels"


def test_a_folder_that_cannot_be_written_to_is_no_failure(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.runners.runtime_cache.replace_bytes", mock.Mock(side_effect=OSError("read-only")))
    with rtx.open(lazy=True) as runner:
        runner.run(images(2))


@pytest.mark.parametrize(
    ("validity", "diagnostics", "words"),
    [
        (
            "INVALID",
            {"UNSUPPORTED_CC", "OLD_CUDA_DRIVER"},
            r"invalid on this machine \(unsupported cc, old cuda driver\)",
        ),
        ("INVALID", set(), r"invalid on this machine \(no reason given\)"),
    ],
)
def test_an_engine_that_tensorrt_rtx_calls_invalid_is_not_deserialized_unless_forced(
    rtx: Any, validity: str, diagnostics: set[str], words: str
) -> None:
    flags = sum(int(getattr(tensorrt_rtx.EngineInvalidityDiagnostics, name)) for name in diagnostics)
    rtx.runtime.get_engine_validity.return_value = (getattr(tensorrt_rtx.EngineValidity, validity), flags)
    with pytest.raises(trt.InvalidEngineError, match=words + "; --force of .* tries it"):
        rtx.open()
    assert "deserialize" not in rtx.kinds()
    with rtx.open(force=True) as runner:
        assert right(runner.run(images(2)), images(2))


@pytest.mark.parametrize("validity", ["VALID", "SUBOPTIMAL"])
def test_an_engine_that_is_merely_slower_runs(rtx: Any, validity: str) -> None:
    rtx.runtime.get_engine_validity.return_value = (getattr(tensorrt_rtx.EngineValidity, validity), 0)
    with rtx.open():
        pass


def test_the_real_tensorrt_rtx_calls_an_engine_invalid_where_there_is_no_driver(tmp_path: Path) -> None:
    if cuda.driver_problem() is None:
        pytest.skip("this machine has a GPU")
    log = trt.Log(tensorrt_rtx)
    with pytest.raises(trt.InvalidEngineError, match="malformed engine"):
        trt.deserialize(tensorrt_rtx, log, b"no engine", "m.plan")
    with pytest.raises(UnavailableError, match="did not load the engine"):
        trt.deserialize(tensorrt_rtx, log, b"no engine", "m.plan", force=True)
