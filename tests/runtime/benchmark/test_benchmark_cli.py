"""The command line over runners that need no engine, in process."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from gmconv.errors import RefusedError, UnavailableError
from runtime.benchmark.__main__ import main
from runtime.benchmark.comparison import Contender
from runtime.benchmark.exports import check_writable
from runtime.benchmark.measure import Artefact
from runtime.benchmark.options import DEVICE_FLAGS, SINGLE_FLAGS
from runtime.benchmark.trtexec import parse
from runtime.runners.base import Runner

Fake = Callable[..., str]
QUICK = ("--duration=0.05", "--warmUp=5")


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_run_prints_trtexecs_summary_and_passes(fake: Fake, host_runner: Runner) -> None:
    done = bench(fake(host_runner), *QUICK)
    assert done.exit_code == 0
    found = parse(done.stdout)
    assert found["Throughput"] > 0
    assert set(found["Latency"]) == {"min", "max", "mean", "median", "p90", "p95", "p99"}
    assert done.stdout.splitlines()[0].startswith("&&&& RUNNING ")
    assert done.stdout.splitlines()[-1].startswith("&&&& PASSED ")


def test_the_host_clock_says_that_copies_are_absent(fake: Fake, host_runner: Runner) -> None:
    done = bench(fake(host_runner), *QUICK)
    assert "H2D Latency, D2H Latency, Enqueue Time and GPU Compute Time: absent" in done.stdout
    assert "Clock: host" in done.stdout
    assert "GPU Compute Time: min" not in done.stdout


def test_a_device_run_has_every_metric_and_says_its_mode(fake: Fake, device_runner: Any) -> None:
    done = bench(fake(device_runner), *QUICK)
    found = parse(done.stdout)
    assert found["GPU Compute Time"]["median"] == 2
    assert found["Latency"]["median"] == 3.5
    for words in ("CUDA events", "CUDA graph: yes", "Data transfers: no", "Waiting: spinning"):
        assert words in done.stdout
    assert device_runner.asked == {"count": 2, "transfers": False, "cuda_graph": True, "streams": 1, "spin": True}


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--trtexec10"], {"transfers": True, "cuda_graph": False, "spin": False}),
        (["--trtexec10", "--useSpinWait"], {"transfers": True, "spin": True}),
        (["--noSpinWait"], {"spin": False, "cuda_graph": True}),
        (["--useSpinWait"], {"spin": True}),
        (["--trtexec10", "--useCudaGraph", "--noDataTransfers"], {"transfers": False, "cuda_graph": True}),
        (["--includeDataTransfers"], {"transfers": True, "cuda_graph": True}),
        (["--noCudaGraph"], {"transfers": False, "cuda_graph": False}),
        (["--exposeDMA"], {"count": 1}),
        (["--infStreams=3"], {"streams": 3}),
        (["--streams=2"], {"streams": 2}),
    ],
)
def test_device_flags_reach_the_runner(fake: Fake, device_runner: Any, flags: list[str], asked: dict[str, Any]) -> None:
    assert bench(fake(device_runner), *QUICK, *flags).exit_code == 0
    assert asked.items() <= device_runner.asked.items()


def test_a_blocking_wait_is_named_in_the_output(fake: Fake, device_runner: Any) -> None:
    assert "Waiting: blocked" in bench(fake(device_runner), *QUICK, "--noSpinWait").stdout
    done = bench(fake(device_runner), *QUICK, "--noSpinWait", "--useSpinWait")
    assert done.exit_code == 2
    assert "exclude each other" in done.stderr


@pytest.mark.parametrize("flag", DEVICE_FLAGS.values())
def test_device_flags_are_refused_on_the_host_clock(fake: Fake, host_runner: Runner, flag: str) -> None:
    value = "=2" if "treams" in flag else ""
    done = bench(fake(host_runner), *QUICK, flag + value)
    assert done.exit_code == 2
    assert flag in done.stderr
    assert "fake cpu" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("&&&& FAILED ")


@pytest.mark.parametrize("flag", SINGLE_FLAGS)
def test_flags_about_one_run_are_refused_in_a_comparison(
    fake: Fake, host_runner: Runner, tmp_path: Path, flag: str
) -> None:
    value = f"={tmp_path / 'x.json'}" if flag.startswith("export") else ""
    value = "=input:x.raw" if flag == "loadInputs" else "=3" if flag in ("idleTime", "avgRuns") else value
    done = bench(fake(host_runner, "a.engine"), fake(host_runner, "b.engine"), *QUICK, f"--{flag}{value}")
    assert done.exit_code == 2
    assert f"--{flag}" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--percentile=101"], "not in [0, 100]"),
        (["--percentile=a,b"], "not a list of numbers"),
        (["--duration=-2"], "-1 for a run until Ctrl-C"),
        (["--warmUp=-1"], "--warmUp"),
        (["--iterations=0"], "--iterations"),
        (["--shapes=input"], "--shapes"),
        (["--loadInputs=input"], "--loadInputs"),
        (["--useCudaGraph", "--noCudaGraph"], "exclude each other"),
        (["--noSuchFlag"], "No such option"),
        (["--warmup=1"], "No such option"),
        (["--twin"], "--twin needs one checkpoint"),
        (["--dumpProfile"], "no profiler"),
        (["--dumpLayerInfo"], "does not describe its layers"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_exit_2(fake: Fake, host_runner: Runner, flags: list[str], words: str) -> None:
    done = bench(fake(host_runner), *QUICK, *flags)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert "Traceback" not in done.output


def test_no_artefact_is_a_usage_error() -> None:
    assert bench().exit_code == 2


@pytest.mark.parametrize("flag", ["--shapes=x:1x3x4x4", "--shapes=input:1x3x4", "--shapes=input:1x3x4x5"])
def test_a_shape_the_network_does_not_take_is_refused(fake: Fake, host_runner: Runner, flag: str) -> None:
    done = bench(fake(host_runner), *QUICK, flag)
    assert done.exit_code == 3
    assert done.stdout.splitlines()[-1].startswith("&&&& FAILED ")


def test_percentiles_and_average_groups_follow_the_flags(fake: Fake, host_runner: Runner) -> None:
    done = bench(
        fake(host_runner), "--duration=0", "--iterations=20", "--warmUp=0", "--avgRuns=5", "--percentile=50,99.9"
    )
    assert set(parse(done.stdout)["Latency"]) == {"min", "max", "mean", "median", "p50", "p99.9"}
    assert done.stdout.count("Average on 5 runs") == 4


def test_export_times_has_trtexecs_fields(fake: Fake, device_runner: Any, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    assert bench(fake(device_runner), *QUICK, f"--exportTimes={file}").exit_code == 0
    rows = json.loads(file.read_text())
    for row in rows:
        assert list(row) == [
            *("startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs"),
            *("startD2hMs", "endD2hMs", "h2dMs", "computeMs", "d2hMs", "latencyMs"),
        ]
        assert row["latencyMs"] == pytest.approx(row["h2dMs"] + row["computeMs"] + row["d2hMs"])
        assert row["computeMs"] == pytest.approx(row["endComputeMs"] - row["startComputeMs"])


def test_exported_times_give_the_printed_summary(fake: Fake, host_runner: Runner, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    done = bench(fake(host_runner), *QUICK, f"--exportTimes={file}")
    latencies = sorted(row["latencyMs"] for row in json.loads(file.read_text()))
    found = parse(done.stdout)["Latency"]
    n = len(latencies)
    assert found["median"] == pytest.approx(np.median(latencies), rel=1e-5)
    assert found["p99"] == pytest.approx(latencies[max(n - 1 - int((1 - 99 / 100) * n), 0)], rel=1e-5)


def test_profile_layers_and_outputs_are_exported(fake: Fake, device_runner: Any, tmp_path: Path) -> None:
    files = {flag: tmp_path / f"{flag}.json" for flag in ("exportProfile", "exportLayerInfo", "exportOutput")}
    flags = [f"--{flag}={file}" for flag, file in files.items()]
    done = bench(fake(device_runner), *QUICK, *flags, "--dumpProfile", "--dumpLayerInfo", "--dumpOutput")
    assert done.exit_code == 0, done.output
    count, conv, _ = json.loads(files["exportProfile"].read_text())
    assert count == {"count": 100}
    assert conv == {"name": "conv1", "timeMs": 150, "averageMs": 1.5, "medianMs": 1.5, "percentage": 75}
    assert json.loads(files["exportLayerInfo"].read_text()) == {"Layers": [{"Name": "conv1"}, {"Name": "fc"}]}
    (output,) = json.loads(files["exportOutput"].read_text())
    assert output == {"name": "logits", "dimensions": "8x10", "values": [0] * 80}
    assert "=== Profile (100 iterations ) ===" in done.stdout


@pytest.mark.parametrize("flag", ["exportTimes", "exportOutput", "exportProfile", "exportLayerInfo", "report"])
def test_a_path_that_cannot_be_written_is_refused_before_the_run(
    fake: Fake, device_runner: Any, tmp_path: Path, flag: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    for path, words in [(tmp_path / "no" / "x.html", "does not exist"), (tmp_path / "folder.html", "is a directory")]:
        done = bench(fake(device_runner), *QUICK, f"--{flag}={path}")
        assert done.exit_code == 3
        assert words in done.stderr
        assert device_runner.log == []


@pytest.mark.parametrize(("flag", "reason"), [(os.ST_RDONLY, "Read-only file system"), (0, "Permission denied")])
def test_a_path_that_cannot_be_written_is_told_by_the_systems_own_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: int, reason: str
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flag))
    with pytest.raises(RefusedError, match=rf"r\.html: cannot be written \({reason}\)$"):
        check_writable(tmp_path / "r.html")


def test_a_full_disk_is_one_sentence_after_the_summary(fake: Fake, host_runner: Runner) -> None:
    done = bench(fake(host_runner), *QUICK, "--exportTimes=/dev/full")
    assert done.exit_code == 6
    assert "No space left on device" in done.stderr
    assert "Throughput:" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("&&&& FAILED ")


def test_a_failed_export_leaves_the_old_file_and_no_other(
    fake: Fake, host_runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "times.json").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    done = bench(fake(host_runner), *QUICK, f"--exportTimes={folder / 'times.json'}")
    assert done.exit_code == 6
    assert [f.name for f in folder.iterdir()] == ["times.json"]
    assert (folder / "times.json").read_text() == "old"


def test_json_is_one_document_and_nothing_else(fake: Fake, device_runner: Any) -> None:
    done = bench(fake(device_runner), *QUICK, "--json")
    found = json.loads(done.stdout)
    assert found["latency_ms"]["median"] == 3.5
    assert found["gpu_compute_ms"]["p99"] == 2
    assert found["mode"]["cuda_graph"] is True
    assert found["queries"] == found["latency_ms"]["count"]
    assert found["interrupted"] is False


def test_a_run_whose_graph_could_not_be_recorded_does_not_say_that_it_had_one(
    fake: Fake, device_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(device_runner), "graph_problem", property(lambda _: "capture invalidated"))
    found = json.loads(bench(fake(device_runner), *QUICK, "--json").stdout)
    assert found["mode"]["cuda_graph"] is False
    assert "CUDA graphs could not be used: capture invalidated" in found["warnings"]


def test_several_artefacts_are_compared_with_the_first(fake: Fake, device_runner_of: Callable[[float], Runner]) -> None:
    slow, fast = fake(device_runner_of(2), "slow.plan"), fake(device_runner_of(1), "fast.plan")
    text = bench(slow, fast, "--duration=0.1", "--warmUp=0")
    assert text.exit_code == 0, text.output
    assert "1 (reference)" in text.stdout
    assert re.search(r"0\.50+ ± 0\.0+", text.stdout)
    found = json.loads(bench(slow, fast, "--duration=0.1", "--warmUp=0", "--json").stdout)
    first, second = found["artefacts"]
    assert first["ratio"] is None
    assert second["reference"] == "slow.plan"
    assert second["ratio"]["value"] == pytest.approx(0.5)
    assert second["ratio"]["low"] <= second["ratio"]["value"] <= second["ratio"]["high"]
    assert found["rounds"] >= 10


def test_a_comparison_of_different_work_is_refused(fake: Fake, host_runner: Runner, device_runner: Any) -> None:
    done = bench(fake(host_runner), fake(device_runner), *QUICK)
    assert done.exit_code == 3
    assert "same work" in done.stderr
    mixed = bench(fake(host_runner), fake(device_runner), *QUICK, "--shapes=input:2x3x4x4")
    assert mixed.exit_code == 0
    assert "different clocks" in mixed.stderr


def test_what_cannot_run_here_is_refused_before_a_twin_is_made(
    fake: Fake, host_runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (checkpoint := tmp_path / "net.pt").touch()
    fake(host_runner, "net.plan")
    error = UnavailableError(f"{tmp_path}/net.plan: an engine runs on an NVIDIA GPU")
    monkeypatch.setattr("runtime.benchmark.measure.open_runner", raising(error))
    monkeypatch.setattr("runtime.benchmark.__main__.with_twins", raising(AssertionError("a twin was made")))
    done = bench(checkpoint, tmp_path / "net.plan", "--twin", *QUICK)
    assert done.exit_code == 6, done.output
    assert done.stderr.splitlines()[-1] == f"Error: {error.message}"


def test_no_message_has_the_path_of_a_twins_file(
    fake: Fake, device_runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (checkpoint := tmp_path / "net.pt").touch()
    fake(device_runner, "net.plan")

    def unusable(_: Any, folder: Path, __: Any) -> list[Contender]:
        error = UnavailableError(f"{folder}/twin-3.plan: no GPU; {folder}/twin-3.low.onnx runs, of {folder}/twin.pt")
        monkeypatch.setattr("runtime.benchmark.measure.open_runner", raising(error))
        (folder / "twin.pt").touch()
        made = (("twin.pt", "torch twin (no masks)"), ("twin-3.plan", "twin of net.plan"))
        return [Contender(Artefact(folder / file, {}, label, True)) for file, label in made]

    monkeypatch.setattr("runtime.benchmark.__main__.with_twins", unusable)
    done = bench(checkpoint, tmp_path / "net.plan", "--twin", *QUICK)
    assert done.exit_code == 6, done.output
    said = "Error: twin of net.plan: no GPU; twin of net.plan runs, of torch twin (no masks)"
    assert done.stderr.splitlines()[-1] == said


def test_an_artefacts_own_options_are_read_behind_its_name(tmp_path: Path) -> None:
    from runtime.benchmark.measure import parse_artefact

    found = parse_artefact("dir/ckpt.pt@form=baked,compiled=true,threads=2")
    assert (found.path, found.options) == (Path("dir/ckpt.pt"), {"form": "baked", "compiled": True, "threads": 2})
    assert found.name == "ckpt.pt@form=baked,compiled=True,threads=2"
    odd = tmp_path / "a@b=c.pt"
    odd.touch()
    assert parse_artefact(str(odd)).options == {}
    with pytest.raises(click.UsageError, match="FILE@option=value"):
        parse_artefact("ckpt.pt@baked")
