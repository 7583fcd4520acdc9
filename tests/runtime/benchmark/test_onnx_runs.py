"""The command on a real ONNX file, in a process of its own."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from runtime.benchmark.layers import model_run_times, parse_ort_profile
from runtime.benchmark.trtexec import parse


def bench(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.benchmark", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_every_export_of_an_onnx_file(tiny_onnx: Path, tmp_path: Path) -> None:
    names = ("exportTimes", "exportOutput", "exportProfile", "exportLayerInfo")
    raw = np.ones((2, 3, 4, 4), np.float32)
    raw.tofile(tmp_path / "ones.raw")
    done = bench(
        tiny_onnx,
        *("--duration=0.2", "--shapes=input:2x3x4x4", f"--loadInputs=input:{tmp_path / 'ones.raw'}", "--cpuThreads=1"),
        *(f"--{name}={tmp_path / name}" for name in names),
    )
    assert "onnxruntime cpu, 1 thread" in done.stdout
    assert "Using values from file for input input" in done.stdout
    assert parse(done.stdout)["Latency"]["median"] < 5
    times, output, profile, layers = (json.loads((tmp_path / name).read_text()) for name in names)
    assert len(times) > 100
    assert output[0]["dimensions"] == "2x10"
    assert output[0]["values"][:10] == output[0]["values"][10:], "both rows were the file's ones"
    assert profile[0] == {"count": 100}
    assert sum(layer["percentage"] for layer in profile[1:]) == pytest.approx(100)
    assert {"fc"} <= {layer["Name"] for layer in layers["Layers"]}


def test_an_artefact_that_a_flag_of_trtexecs_names_has_options_too(tiny_onnx: Path) -> None:
    assert "onnxruntime cpu, 1 thread" in bench(f"--onnx={tiny_onnx}@threads=1", "--duration=0.1").stdout


def test_the_profile_is_not_from_the_timed_session(tiny_onnx: Path, tmp_path: Path) -> None:
    bench(tiny_onnx, "--duration=0.1", f"--exportProfile={tmp_path / 'p.json'}")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p.json"], "ONNX Runtime's own profile file is not left about"
    assert not list(Path.cwd().glob("profile*.json"))


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_prints_what_it_has_and_exits_130(tiny_onnx: Path, as_json: bool) -> None:
    command = [sys.executable, "-m", "runtime.benchmark", str(tiny_onnx), "--duration=-1", "--warmUp=10"]
    process = subprocess.Popen(
        command + ["--json"] * as_json,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "queries" not in (line := process.stderr.readline()):  # the first progress line, after one second
        assert line, "ended before the first progress line"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after" in err
    assert "Traceback" not in err
    if as_json:
        found = json.loads(out)
        assert found["interrupted"] is True
        assert found["latency_ms"]["count"] == found["queries"] > 100
    else:
        assert parse(out)["Throughput"] > 0
        assert out.splitlines()[-1].startswith("&&&& FAILED ")


def test_ctrl_c_in_a_comparison_prints_the_table_so_far(tiny_onnx: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.benchmark", str(tiny_onnx), str(tiny_onnx), "--duration=-1", "--warmUp=10"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "rounds" not in (line := process.stderr.readline()):
        assert line, "ended before the first progress line"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after" in err
    assert "Traceback" not in err
    assert "1 (reference)" in out
    assert re.search(r"\d\.\d+ (± \d\.\d+|\(\d\.\d+ to)", out)
    assert out.splitlines()[-1].startswith("&&&& FAILED ")


def test_ctrl_c_before_the_first_query_exits_130(tiny_onnx: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.benchmark", str(tiny_onnx), "--warmUp=60000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "Starting inference" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "name"), [(b"", "empty.onnx"), (b"not a network", "foreign.onnx"), (b"PK\x03\x04garbage", "broken.pt")]
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    done = bench(path, "--duration=0.1", code=3)
    assert done.stdout.splitlines()[-1].startswith("&&&& FAILED ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_truncated_file_and_a_missing_one_are_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    half.write_bytes(tiny_onnx.read_bytes()[:700])
    assert "half.onnx" in bench(half, code=3).stderr
    assert "no such file" in bench(tmp_path / "none.onnx", code=3).stderr


def test_a_gpu_that_is_not_there_is_exit_6(tiny_onnx: Path) -> None:
    from runtime.benchmark.machine import gpu_state

    if gpu_state(0) is not None:
        pytest.skip("this machine has a GPU")
    bench(tiny_onnx, "--device=0", code=6)


def test_the_same_file_twice_has_a_ratio_of_about_one(tiny_onnx: Path) -> None:
    done = bench(tiny_onnx, tiny_onnx, "--duration=1", "--json")
    ratio = json.loads(done.stdout)["artefacts"][1]["ratio"]
    assert 0.5 < ratio["low"] <= ratio["value"] <= ratio["high"] < 2


def test_an_ort_profile_is_read_per_node_and_per_run() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "dur": 100},
        {"cat": "Node", "name": "conv_fence_before", "dur": 1, "args": {}},
        {"cat": "Node", "name": "conv_kernel_time", "dur": 60, "args": {"op_name": "Conv"}},
        {"cat": "Node", "name": "fc_kernel_time", "dur": 20, "args": {"op_name": "Gemm"}},
        {"cat": "Session", "name": "model_run", "dur": 90},
        {"cat": "Node", "name": "conv_kernel_time", "dur": 50, "args": {"op_name": "Conv"}},
        {"cat": "Node", "name": "fc_kernel_time", "dur": 10, "args": {"op_name": "Gemm"}},
    ]
    text = json.dumps(events)
    conv, fc = parse_ort_profile(text, 1)
    assert (conv.name, conv.times, fc.times) == ("conv", (0.05,), (0.01,))
    assert model_run_times(text) == [0.1, 0.09]


def test_a_node_is_named_after_the_module_whose_weight_it_holds(digits_onnx: Path) -> None:
    from runtime.benchmark.layers import _in_users_words, layer_names

    names = layer_names(digits_onnx)
    modules = set(names.values())
    assert {"conv1", "layer1.0.conv1", "layer3.0.conv2", "linear"} <= modules
    relu = next(name for name, module in names.items() if module == "layer1.0.conv1" and name.startswith("relu"))
    assert _in_users_words(f"{relu}_nchwc", names) == f"layer1.0.conv1 ({relu}_nchwc)"
    assert _in_users_words("ReorderOutput_token_3", names) == "ReorderOutput_token_3"


def test_help_is_quick_and_names_trtexecs_flags() -> None:
    began = time.perf_counter()
    done = bench("--help")
    assert time.perf_counter() - began < 3, "a heavy import at module level"
    for flag in ("--warmUp", "--exportTimes", "--useCudaGraph", "--loadInputs", "--infStreams", "--trtexec10"):
        assert re.search(rf"{flag}\b", done.stdout)
