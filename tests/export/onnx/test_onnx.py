"""`python -m export.onnx`: a checkpoint becomes an ONNX file with a proof, or one sentence and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import gmconv
from export.onnx import cases, proof
from export.precision import convert_precision
from gmconv.errors import RefusedError
from gmconv.files import sha256_file
from gmconv.foreign import Foreign
from gmconv.surgery import masked_layers
from runtime.benchmark.inputs import make_feeds
from runtime.evaluate.score import EvaluateOptions, evaluate
from runtime.manifest import read_manifest
from runtime.records import UNROUNDED
from runtime.runners import open_runner
from tests.export.conftest import export

Run = Callable[..., subprocess.CompletedProcess[str]]

MY_NETWORK = """
import torch
from torch import nn
import gmconv

class Squeeze(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)
    def forward(self, x):
        scale = self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(scale)

class Net(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, padding_mode="reflect", bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 5, padding="same", groups=8)
        self.even = nn.Conv2d(8, 8, 4, padding=1)
        self.squeeze = Squeeze(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.head, self.other = nn.Linear(8, num_classes), nn.Linear(8, 3)
        self.in_training = nn.Conv2d(8, 8, 3)
    def forward(self, image):
        x = torch.nn.functional.silu(self.norm(self.stem(image)))
        x = self.squeeze(self.even(self.depthwise(x)))
        x = self.shared(torch.relu(self.shared(x))).mean((2, 3))
        if self.training:
            x = self.in_training(x)
        return {"logits": self.head(x), "aux": self.other(x)}

def make(num_classes=7):
    return gmconv.convert(Net(num_classes))
"""


def random_checkpoint(path: Path, name: str, shape: tuple[int, int, int], **kwargs: Any) -> Path:
    torch.manual_seed(0)
    model = gmconv.models.create(name, **kwargs)
    for layer in masked_layers(model).values():
        nn.init.uniform_(layer.sigma, 0.4, 5)
    gmconv.save_checkpoint(path, model, f"gmconv.models:{name}", shape, kwargs)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("net") / "net.pt", "resnet8", (3, 16, 16))


def test_the_manifest_tells_the_whole_story(digits_checkpoint: Path, digits_onnx: Path) -> None:
    manifest = read_manifest(digits_onnx)
    assert manifest.artefact.sha256 == sha256_file(digits_onnx)
    assert [(link.kind, link.sha256) for link in manifest.chain] == [("checkpoint", sha256_file(digits_checkpoint))]
    assert [(s.name, s.dtype, s.shape) for s in manifest.inputs] == [("input", "float32", ("batch", 3, 16, 16))]
    assert [(s.name, s.dtype, s.shape) for s in manifest.outputs] == [("logits", "float32", ("batch", 10))]
    assert manifest.labels == tuple("0123456789")
    assert manifest.dataset is not None
    assert manifest.certificate is not None
    assert len(manifest.certificate["layers"]) == 7
    assert manifest.parity is not None
    assert manifest.parity.passed
    hops = {(hop.name, hop.inputs, hop.shapes["input"]) for hop in manifest.parity.hops}
    for batch in (1, 2, 3):
        assert ("live -> baked", "noise, seed 0", (batch, 3, 16, 16)) in hops
        assert ("baked -> ORT", "noise, seed 0", (batch, 3, 16, 16)) in hops
    assert ("baked -> ORT", "held-out digits", (64, 3, 16, 16)) in hops
    assert all(hop.bitwise for hop in manifest.parity.hops if hop.name == "live -> baked")
    assert {"torch", "onnx", "onnxruntime"} <= set(manifest.versions)


def test_onnx_runtime_computes_what_the_checkpoint_computes(digits_checkpoint: Path, digits_onnx: Path) -> None:
    import onnxruntime

    model = gmconv.load_checkpoint(digits_checkpoint).model
    x = np.random.default_rng(5).standard_normal((4, 3, 16, 16), dtype=np.float32)
    session = onnxruntime.InferenceSession(str(digits_onnx), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        live = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run(None, {"input": x})[0], live, atol=1e-4 * np.abs(live).max())


def test_no_path_of_this_machine_is_in_the_file_but_module_names_are(digits_onnx: Path) -> None:
    raw = digits_onnx.read_bytes()
    root = str(Path(__file__).parent.parent.parent)
    for leak in (root, sys.prefix, str(Path.home()), "site-packages", ".py"):
        assert leak.encode() not in raw, leak
    assert str(digits_onnx.parent) not in digits_onnx.with_name(digits_onnx.name + ".json").read_text()
    nodes = onnx.load(digits_onnx).graph.node
    scopes = [p.value for node in nodes for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
    assert any("layer1.0.conv2" in scope or "layer1.0.bn2" in scope for scope in scopes)


def test_the_same_checkpoint_gives_the_same_bytes(digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "export.onnx", str(digits_checkpoint), "-o", str(tmp_path / "net.onnx"), "--quiet"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    assert sha256_file(tmp_path / "net.onnx") == sha256_file(digits_onnx)  # another process, folder and hash seed


def test_a_network_never_seen_before(tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynets.py").write_text(MY_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import mynets  # type: ignore[import-not-found]

    model = mynets.make()
    for layer in masked_layers(model).values():
        nn.init.uniform_(layer.sigma, 0.4, 5)
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "net.pt")
    arguments = [tmp_path / "net.pt", "--arch", "mynets:make", "--num-classes", "7", "--input-shape", "3,40,36"]
    done = cli("export.onnx", *map(str, arguments), "--json")
    manifest = json.loads(done.stdout)
    assert [spec["name"] for spec in manifest["outputs"]] == ["logits", "aux"]
    assert manifest["parity"]["result"] == "passed"
    assert {o["output"] for hop in manifest["parity"]["hops"] for o in hop["outputs"]} == {"logits", "aux"}
    assert manifest["export"]["notes"][-1] == "not in the graph, as no output needs them: in_training"


def test_dynamic_height_and_width_are_compared_at_another_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = random_checkpoint(tmp_path / "net.pt", "resnet8", (3, 16, 16))
    assert export(path, "--dynamic-hw", "-q") == 0
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["PASSED "], "the closing line alone"
    manifest = read_manifest(tmp_path / "net.onnx")
    assert manifest.inputs[0].shape == ("batch", 3, "height", "width")
    assert manifest.parity is not None
    assert (3, 3, 24, 56) in [hop.shapes["input"] for hop in manifest.parity.hops]
    assert manifest.preprocessing is None
    with open_runner(tmp_path / "net.onnx") as runner:
        assert make_feeds(runner, {}, {}, 0)["input"].shape == (1, 3, 16, 16)  # the usual size, from the manifest
    random, data = np.random.default_rng(0), tmp_path / "ready.npz"
    np.savez(data, images=random.random((8, 3, 24, 20), np.float32), labels=np.arange(8))  # another size
    fp16 = convert_precision(tmp_path / "net.onnx", None, "fp16", verify=True, images=data)
    assert fp16.parity is not None
    assert (8, 3, 24, 20) in [hop.shapes["input"] for hop in fp16.parity.hops]
    files = [path, tmp_path / "net.onnx", tmp_path / "net.fp16.onnx"]
    scores = evaluate(files, EvaluateOptions(images=data))
    assert [row.to_dict()["samples"] for row in scores.rows] == [8, 8, 8]
    idle = EvaluateOptions(images=data, foreign=Foreign(input_shape=(3, 16, 16)))
    with pytest.raises(RefusedError, match="input_shape describes a checkpoint, and none is read here"):
        evaluate(tmp_path / "net.fp16.onnx", replace(idle, reference=tmp_path / "net.onnx"))


def test_fixed_batch_names_and_external_data(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed.onnx"
    names = ("--input-names", "image", "--output-names", "scores")
    assert export(checkpoint, "-o", out, "--batch", "4", *names, "--external-data", "-q") == 0
    manifest = read_manifest(out)
    assert (manifest.inputs[0].name, manifest.inputs[0].shape) == ("image", (4, 3, 16, 16))
    assert manifest.outputs[0].name == "scores"
    assert [entry.file for entry in manifest.external] == ["fixed.onnx.data"]
    assert (tmp_path / "fixed.onnx.data").stat().st_size > 10 * out.stat().st_size


def test_simplified_graphs_are_proven_too(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, "-o", tmp_path / "slim.onnx", "--simplify", "-q") == 0
    manifest = read_manifest(tmp_path / "slim.onnx")
    assert manifest.parity is not None
    assert manifest.parity.passed


def test_several_precisions_share_one_export(
    digits_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(digits_checkpoint, "-o", tmp_path / "net.onnx", "--precision", "fp16,fp32,int8", "--json") == 0
    assert [found["precision"] for found in json.loads(capsys.readouterr().out)] == ["fp16", "fp32", "int8"]
    fp32 = read_manifest(tmp_path / "net.onnx")
    for precision in ("fp16", "int8"):
        manifest = read_manifest(tmp_path / f"net.{precision}.onnx")
        assert manifest.precision == precision
        assert [link.sha256 for link in manifest.chain] == [fp32.chain[0].sha256, fp32.artefact.sha256]
        assert manifest.parity is not None
        assert manifest.parity.passed
        assert any(hop.name.endswith(UNROUNDED) for hop in manifest.parity.hops)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_one_other_precision_leaves_only_that_file(digits_checkpoint: Path, tmp_path: Path) -> None:
    assert export(digits_checkpoint, "-o", tmp_path / "half.onnx", "--precision", "fp16", "-q") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.onnx", "half.onnx.json"]
    assert read_manifest(tmp_path / "half.onnx").precision == "fp16"


@pytest.mark.parametrize("opset", [18, 21])
def test_the_opset_asked_for_is_the_opset_written(opset: int, checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, "-o", tmp_path / "net.onnx", "--opset", str(opset), "-q") == 0
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == opset


def outputs_with(change: Callable[[dict[str, np.ndarray[Any, Any]]], None]) -> Callable[..., Any]:
    real = proof.run_onnx

    def run(*arguments: Any, **options: Any) -> list[Any]:
        outputs = real(*arguments, **options)
        for output in outputs:
            change(output)
        return outputs

    return run


WRONG = {
    "a wrong value": (lambda o: o["logits"].__setitem__((0, 0), o["logits"][0, 0] * 1.01 + 0.1), "relative RMS error"),
    "NaN": (lambda o: o["logits"].__setitem__((0, 0), np.nan), "NaN or Inf in the candidate"),
    "a missing output": (lambda o: o.clear(), "missing in the candidate"),
    "another shape": (lambda o: o.update(logits=o["logits"][:, :1]), "shapes differ"),
}


@pytest.mark.parametrize("case", WRONG)
def test_failed_parity_is_exit_4_and_leaves_nothing(
    case: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = WRONG[case]
    monkeypatch.setattr(proof, "run_onnx", outputs_with(change))
    assert export(checkpoint, "-o", tmp_path / "net.onnx", "-q") == 4
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_cases_is_a_failure_not_a_pass(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "comparison_cases", lambda *_, **__: [])
    assert export(checkpoint, "-o", tmp_path / "net.onnx", "-q") == 4
    assert "nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.pt"], 3, "no such file"),
        (["{ckpt}", "-o", "{tmp}/nowhere/net.onnx"], 3, "cannot be written"),
        (["{ckpt}", "-o", "{tmp}"], 3, "is a directory"),
        (["{ckpt}", "--opset", "17"], 2, "17"),
        (["{ckpt}", "--opset", "99"], 3, "--opset 99: the installed onnx knows opsets up to "),
        (["{ckpt}", "--input-shape", "3,16"], 2, "C,H,W"),
        (["{ckpt}", "--input-shape", "4,16,16"], 3, "does not run on samples of 4x16x16"),
        (["{ckpt}", "--output-names", "a,b"], 3, "has 1 outputs"),
        (["{ckpt}", "--input-names", "a,b"], 3, "takes 1 inputs (input), 2 names were given"),
        (["{ckpt}", "--crop", "2"], 2, 'is "lossless" or a number from 0'),
        (["{ckpt}", "--crop", "nan"], 2, 'is "lossless" or a number from 0'),
        (["{ckpt}", "--crop-budget", "top1:0"], 2, "points of top-1"),
        (["{ckpt}", "--crop-budget", "1e-2", "--crop", "0"], 2, "exclude each other"),
        (["{ckpt}", "--crop-budget", "1e-2", "--crop-gain", "joy"], 2, "joy"),
        (["{ckpt}", "--crop", "1e-3", "--crop-gain", "latency"], 2, "give a budget"),
        (["{ckpt}", "--precision", "fp12"], 2, "'fp12' is none of"),
        (["{ckpt}", "--images", "{tmp}/nothing"], 3, "nothing"),
        (["{ckpt}", "--arch", "resnet21"], 3, "resnet21"),
        (["{ckpt}", "--arch", "timm:resnet18"], 6, "pip install timm"),
    ],
)
def test_bad_arguments_are_one_sentence_and_the_documented_exit_code(
    arguments: Sequence[str],
    code: int,
    words: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    given = [a.format(ckpt=checkpoint, tmp=tmp_path) for a in arguments]
    if "-o" not in given:
        given += ["-o", str(tmp_path / "net.onnx")]
    assert export(*given, "-q") == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("Error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from export.onnx.__main__ import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, str(checkpoint), "-o", str(tmp_path / "net.onnx"), "-q"]
    for more in ([], ["--external-data"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 6, done.stderr
        assert "net.onnx: cannot be written" in done.stderr
        assert done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def start_export(checkpoint: Path, out: Path, seconds: float, with_signal: signal.Signals) -> int:
    command = [sys.executable, "-m", "export.onnx", str(checkpoint), "-o", str(out), "-q"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    child.send_signal(with_signal)
    return child.wait(60)


def test_ctrl_c_leaves_nothing_and_exits_130(checkpoint: Path, tmp_path: Path) -> None:
    code = start_export(checkpoint, tmp_path / "net.onnx", 2.0, signal.SIGINT)
    assert code in (130, 0)
    if code:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_a_kill_never_leaves_a_half_written_file_under_a_final_name(
    seconds: float, checkpoint: Path, tmp_path: Path
) -> None:
    start_export(checkpoint, tmp_path / "net.onnx", seconds, signal.SIGKILL)
    if (tmp_path / "net.onnx.json").exists():
        read_manifest(tmp_path / "net.onnx")
    else:
        assert not (tmp_path / "net.onnx").exists()


BRANCH = """
import torch, gmconv
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
    def forward(self, x):
        y = self.conv(x)
        return y.mean((2, 3)) if y.sum() > 0 else y.amax((2, 3))
def make():
    return gmconv.convert(Net())
"""


def test_the_end_of_the_exporters_own_words_appears_when_it_fails_and_only_then(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, "-o", tmp_path / "net.onnx") == 0
    assert "exporter" not in capfd.readouterr().err
    (tmp_path / "branching.py").write_text(BRANCH)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(__import__("branching").make().state_dict(), tmp_path / "branching.pt")
    assert export(tmp_path / "branching.pt", "--arch", "branching:make", "--input-shape", "3,8,8") == 3
    said = capfd.readouterr().err
    assert "if y.sum() > 0" in said  # the exporter's report names the line of the user's forward
    assert "torchvision" not in said
    assert "the exporter said at last, all of it with -v:" in said
    assert said.splitlines()[-1].startswith("Error: the network cannot be exported")
    assert not (tmp_path / "branching.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("resnet50", 224), ("alexnet", 224)])
def test_full_size_networks_with_random_sigmas(name: str, size: int, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "net.pt", name, (3, size, size))
    assert export(path, "-q") == 0


BIG = """
import torch, gmconv
from torch import nn
def make():
    layers = [nn.Conv2d(3, 4096, 1)]
    for _ in range(4):
        layers += [nn.Conv2d(4096, 4096, 3, padding=1), nn.Tanh()]
    return gmconv.convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4096, 10)))
"""


def proportional_memory(pid: int) -> int:
    """Bytes that a process and its descendants have resident, shared pages counted once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = [c for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return own + sum(proportional_memory(int(child)) for child in children)


def peak_memory(child: subprocess.Popen[bytes]) -> int:
    peak = 0
    while child.poll() is None:
        peak = max(peak, proportional_memory(child.pid))
        time.sleep(0.05)
    return peak


@pytest.mark.slow
def test_more_than_two_gibibytes_of_weights(tmp_path: Path) -> None:
    """Peak resident memory of all processes together, above that of the imports, is under 2.5 times the weights."""
    (tmp_path / "bignet.py").write_text(BIG)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent.parent}"}
    make = "import torch, bignet; torch.manual_seed(0); torch.save(bignet.make().state_dict(), 'net.pt')"
    subprocess.run([sys.executable, "-c", make], check=True, cwd=tmp_path, env=environment)
    weights = (tmp_path / "net.pt").stat().st_size
    assert weights > 2**31
    arguments = ["--arch", "bignet:make", "--input-shape", "3,4,4", "-q"]
    child = subprocess.Popen([sys.executable, "-m", "export.onnx", "net.pt", *arguments], cwd=tmp_path, env=environment)
    peak = peak_memory(child)
    assert child.returncode == 0
    base = peak_memory(subprocess.Popen([sys.executable, "-c", "import torch, onnx, onnxruntime"]))
    assert peak - base < 2.5 * weights
    manifest = read_manifest(tmp_path / "net.onnx")
    assert [entry.file for entry in manifest.external] == ["net.onnx.data"]
    assert manifest.parity is not None
    assert manifest.parity.passed


def test_one_mean_for_three_channels_is_refused_before_anything_is_exported(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, "-o", tmp_path / "net.onnx", "--mean", "0.5", "--std", "0.5") == 3
    said = capsys.readouterr().err
    assert "1 means and 1 deviations for 3 channels; give a number for each channel" in said
    assert "exporting to ONNX" not in said
