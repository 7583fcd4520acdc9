"""What goes to a machine without a network is all that the steps import there: one wheel forgotten ends a step."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

GPU = Path(__file__).parents[1]
ROOT = GPU.parents[1]
#: What the steps use: of ours, and of NVIDIA's client.
EXTRAS = ("export", "cpu", "rtx", "cuda", "serve")
ASKED = ("tritonclient[http,grpc]",)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(name: str) -> set[str]:
    found = re.search(rf"^{name}=\(([^)]*)\)", (GPU / "carry.sh").read_text(), re.MULTILINE)
    assert found, name
    return {normal(word) for word in found[1].split()}


def needed(requirements: list[str], has: set[str]) -> set[str]:
    """The names of everything that `requirements` need, down to what the machine has."""
    found: set[str] = set()
    left = [Requirement(text) for text in requirements]
    while left:
        asked = left.pop()
        if normal(asked.name) in has | found:
            continue
        found.add(normal(asked.name))
        for text in metadata.requires(asked.name) or ():
            inner = Requirement(text)
            extras = asked.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(inner)
    return found


def test_every_package_that_the_machine_lacks_is_carried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *ASKED]
    for extra in EXTRAS:
        asked += [text for text in project["optional-dependencies"][extra] if not text.startswith(project["name"])]
    missing = needed(asked, listed("has")) - listed("carried")
    assert {name for name in missing if not name.startswith("tensorrt-rtx")} == set(), "neither there nor carried"


def test_nothing_of_it_travels_by_itself(tmp_path: Path) -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "/carried/" in ignored, "the working tree travels too, both parts in one call are too large"


def test_a_folder_without_photographs_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "photographs" / "train").mkdir(parents=True)
    for photographs, lacking in (("absent", "train"), ("photographs", "test")):
        command = ["bash", str(GPU / "carry.sh"), "carried", photographs]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout) == (2, "")
        assert run.stderr.startswith(f"{photographs}: no folder {lacking},")
        assert not (tmp_path / "carried").exists()


def call(half: str, carried: Path, kept: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """oncard.sh in a copy of the folder, with a `python3` that unpacks, and else says what it was asked for."""
    folder = tmp_path / "checkout" / "tests" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GPU / "oncard.sh", folder)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir(exist_ok=True)
    python.write_text(
        f'#!/bin/sh\n[ "$2" = tarfile ] && exec {sys.executable} "$@"\necho "python3 $* PYTHONPATH=$PYTHONPATH"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "KEPT": str(kept)}
    command = ["bash", str(folder / "oncard.sh"), half, str(carried), str(tmp_path / "out")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_second_call_joins_what_was_cut(tmp_path: Path) -> None:
    carried, kept = tmp_path / "carried", tmp_path / "kept"
    for half in "12":
        (carried / half / "wheels").mkdir(parents=True)
        (carried / half / "wheels" / f"{half}.whl").write_bytes(b"")
    (carried / "1" / "artefacts").mkdir()
    library = tmp_path / "tensorrt_rtx_libs"
    library.mkdir()
    (library / "libtensorrt_rtx.so.1").write_bytes(b"an engine's runtime" * 1000)
    archive = tmp_path / "library.tar.xz"
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(library, library.name)
    whole = archive.read_bytes()
    (carried / "1" / "library.1").write_bytes(whole[:100])
    (carried / "2" / "library.2").write_bytes(whole[100:])
    alone = call("2", carried, tmp_path / "fresh", tmp_path)
    assert alone.returncode == 2, "another machine than the first call's"
    assert "first call" in alone.stderr
    first, second = call("1", carried, kept, tmp_path), call("2", carried, kept, tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "--steps driver,parity,latency" in first.stdout
    assert "--steps engines,comparison,serving,providers,accuracy" in second.stdout
    assert (kept / "site" / library.name / "libtensorrt_rtx.so.1").read_bytes() == b"an engine's runtime" * 1000
    assert f"PYTHONPATH={kept}/site" in second.stdout
    # A folder "tests" among the machine's packages would come before ours, unless ours is a package itself.
    assert (tmp_path / "checkout" / "tests" / "__init__.py").exists()
