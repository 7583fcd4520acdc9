"""The image's locks: every requirement pinned and hashed, in step with pyproject.toml, and free of torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
VARIANTS = {
    "cpu": (["cpu"], []),
    "gpu": (["gpu", "cuda"], ["gpu.in"]),
    "tensorrt": (["tensorrt", "cuda"], ["engines.in"]),
    "rtx": (["rtx", "cuda"], ["engines.in"]),
}
TOOLS = ("tools",)
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+)(?: ;[^\\]*)? \\$")


def read_lock(name: str) -> dict[str, Version]:
    """Pins of a lock. Fails on a line that is neither a pin, a hash nor a comment, and on a pin without a hash."""
    pins: dict[str, Version] = {}
    hashed: set[str] = set()
    current = ""
    for line in (DOCKER / f"requirements-{name}.txt").read_text().splitlines():
        if match := PIN.match(line):
            current = canonicalize_name(match["name"])
            pins[current] = Version(match["version"])
        elif re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?", line):
            hashed.add(current)
        else:
            assert not line or line.lstrip().startswith("#"), line
    assert set(pins) == hashed
    return pins


def wanted(variant: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, files = VARIANTS[variant]
    lines = list(project["dependencies"])
    for extra in ["serve", "otel", *extras]:
        lines += project["optional-dependencies"][extra]
    for file in files:
        lines += (DOCKER / file).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    own = {extra for r in found if r.name == project["name"] for extra in r.extras}
    assert own <= set(extras), "an extra that names another brings it along"
    return [r for r in found if r.name != project["name"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_lock_satisfies_pyproject(variant: str) -> None:
    pins = read_lock(variant)
    for requirement in wanted(variant):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not locked: make lock-image"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{name} {pins[name]}: make lock-image"


@pytest.mark.parametrize("name", [*VARIANTS, *TOOLS])
def test_every_pin_has_a_hash_and_torch_is_not_among_them(name: str) -> None:
    pins = read_lock(name)
    assert pins
    assert not {n for n in pins if n == "torch" or n.startswith(("torchvision", "torchaudio", "triton-"))}


def test_the_variants_agree_on_what_they_share() -> None:
    locks = {name: read_lock(name) for name in VARIANTS}
    for package in set().union(*locks.values()):
        versions = {name: lock[package] for name, lock in locks.items() if package in lock}
        assert len(set(versions.values())) == 1, (package, versions)


def test_each_variant_carries_its_engine_and_no_other() -> None:
    engines = {"onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"}
    assert engines & set(read_lock("cpu")) == {"onnxruntime"}
    assert engines & set(read_lock("gpu")) == {"onnxruntime-gpu"}
    assert engines & set(read_lock("tensorrt")) == {"onnxruntime", "tensorrt"}
    assert engines & set(read_lock("rtx")) == {"onnxruntime", "tensorrt-rtx"}


def test_the_variants_for_a_gpu_carry_what_runs_it() -> None:
    """runtime/cuda on cuda-bindings, for engines and for the clocks of ONNX Runtime; NVML for metrics."""
    for variant in VARIANTS:
        assert {"cuda-bindings", "nvidia-ml-py"} <= set(read_lock(variant)) or variant == "cpu", variant


def test_nothing_is_compiled() -> None:
    """Neither the image nor the development environment needs a compiler: pycuda, which does, is for who has it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found = [Requirement(line) for line in extras[extra]]
        nested = [packages(e) for r in found if r.name == "gmconv-deploy" for e in r.extras]
        return {r.name for r in found}.union(*nested)

    assert {extra for extra in extras if "pycuda" in packages(extra)} == {"pycuda"}
    assert not {name for name in (*VARIANTS, *TOOLS) if "pycuda" in read_lock(name)}
    assert not re.search(r"apt-get|gcc|g\+\+", (DOCKER / "Dockerfile").read_text())
    assert {"tensorrt-rtx", "cuda-bindings", "onnxruntime"} <= packages("dev")
    assert {"tensorrt-rtx", "cuda-bindings", "onnxruntime-gpu"} <= packages("dev-gpu")
    assert "onnxruntime" not in packages("dev-gpu"), "it would take the place of the one with CUDA"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VARIANTS, *TOOLS])
def test_the_lock_resolves_again_to_itself(name: str, tmp_path: Path) -> None:
    """Resolving from the index with the lock's own pins preferred changes nothing: satisfiable, complete, not stale."""
    if shutil.which("uv", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("uv is not installed")
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    shutil.copytree(DOCKER, tmp_path / "docker")
    before = (tmp_path / "docker" / f"requirements-{name}.txt").read_text()
    done = subprocess.run(
        ["sh", "docker/lock.sh", sys.executable], cwd=tmp_path, capture_output=True, text=True,
        env={"LOCKS": name, "PATH": "/usr/bin:/bin"} | _network(), timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "docker" / f"requirements-{name}.txt").read_text() == before


def _network() -> dict[str, str]:
    return {
        k: v for k, v in os.environ.items() if k.upper().startswith(("PIP_", "UV_", "SSL_", "HTTP", "NO_PROXY", "HOME"))
    }
