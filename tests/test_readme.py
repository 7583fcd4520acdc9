"""The README names commands, flags, targets and files that exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python -m")
]
INLINE = re.findall(r"`(python -m [^`]+)`", README)
SHORT = re.findall(r"^(gmconv [^#\n]+)", README, re.MULTILINE) + re.findall(r"`(gmconv [a-z]+)`", README)


@pytest.mark.parametrize("command", [*COMMANDS, *INLINE, *SHORT])
def test_every_command_and_flag_exists(command: str) -> None:
    words = command.split()
    module = words[2] if words[0] == "python" else f"gmconv {words[1]}"
    shown = subprocess.run([sys.executable, "-m", *module.split(), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    for flag in re.findall(r"(?<![\w-])--[\w-]+", command):
        assert re.search(rf"{flag}\b", shown.stdout), f"{module} has no {flag}"


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([\w-]+)`", README)) | set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^(?:[\w $()/.-]+ )?{target}(?: [\w -]+)?:", makefile, re.MULTILINE), target


def test_every_local_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    for link in links:
        assert link in anchors if link.startswith("#") else (ROOT / link).exists(), link


@pytest.fixture(scope="module")
def workplace(digits_checkpoint: Path, digits_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's commands name."""
    import numpy as np
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits
    from torch import nn

    import gmconv

    folder = tmp_path_factory.mktemp("readme")
    for name in ("ckpt", "k7"):
        shutil.copy(digits_checkpoint, folder / f"{name}.pt")
    for name in ("model", "a", "b", "whole", "cropped"):
        run = [sys.executable, "-m", "export.onnx", "ckpt.pt", "-o", f"{name}.onnx", "-q"]
        subprocess.run(run, check=True, cwd=folder, env=environment(folder))
    package = folder / "mypackage"
    package.mkdir()
    (package / "nets.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())"
    )
    torch.save(gmconv.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())).state_dict(), folder / "net.pt")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "state.pth")
    digits = load_digits()
    for index, (image, digit) in enumerate(zip(digits.images[:60], digits.target, strict=False)):
        for kind in (folder / "DIR", folder / "val" / str(digit)):
            kind.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(kind / f"{index}.png")
    for to in ("fp16", "int8"):
        run = [sys.executable, "-m", "export.precision", "model.onnx", "--to", to, "--target", "cpu", "-q"]
        subprocess.run(run, check=True, cwd=folder, env=environment(folder))
    build = [sys.executable, "-m", "export.tensorrt", "model.onnx", "--flavor", "rtx", "-o", "model.plan"]
    subprocess.run(build, check=True, cwd=folder, env=environment(folder))
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}


def lacks(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str, workplace: Path) -> None:
    expected = 0
    if ("timm" in command and lacks("timm")) or ("model.plan" in command and not Path("/dev/nvidia0").exists()):
        expected = 6
    child = subprocess.Popen(
        [sys.executable, *shlex.split(command)[1:]], cwd=workplace, env=environment(workplace), stderr=subprocess.PIPE
    )
    if "runtime.serve" in command:
        time.sleep(8)
        child.send_signal(signal.SIGTERM)
    _, error = child.communicate(timeout=300)
    assert child.returncode == expected, error.decode()
