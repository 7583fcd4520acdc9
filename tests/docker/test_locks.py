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
    "gpu": (["gpu"], ["gpu.in"]),
    "tensorrt": (["tensorrt", "cuda"], ["engines.in"]),
    "rtx": (["rtx", "cuda"], ["engines.in"]),
}
ENGINES = ("tensorrt", "rtx")
TOOLS = ("tools", "cuda-headers")
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
    for extra in ["serve", *extras]:
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


def test_the_variants_that_run_an_engine_carry_what_runs_it_and_no_other_compiles() -> None:
    """runtime/cuda needs pycuda and cuda-bindings for any engine, ONNX Runtime neither; NVML is for metrics."""
    driver = {"pycuda", "cuda-bindings"}
    for variant in VARIANTS:
        assert driver & set(read_lock(variant)) == (driver if variant in ENGINES else set()), variant
        assert ("nvidia-ml-py" in read_lock(variant)) == (variant != "cpu"), variant


def test_only_the_variants_that_compile_have_a_compiler() -> None:
    """pycuda is source only: its variants build on the stage with a compiler, the others on the bare tools."""
    dockerfile = (DOCKER / "Dockerfile").read_text()
    for variant in VARIANTS:
        stage = "toolchain-engine" if variant in ENGINES else "tools"
        assert f"FROM {stage} AS toolchain-{variant}\n" in dockerfile, variant


def test_the_development_environment_compiles_nothing() -> None:
    """`make install` must work without CUDA: engines are built there, not run."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found = [Requirement(line) for line in extras[extra]]
        nested = [packages(e) for r in found if r.name == "gmconv-deploy" for e in r.extras]
        return {r.name for r in found}.union(*nested)

    assert "tensorrt-rtx" in packages("dev")
    assert "pycuda" not in packages("dev")
    assert "pycuda" in packages("tensorrt")


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
