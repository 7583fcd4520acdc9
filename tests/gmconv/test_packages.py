"""`gmconv.packages`: the advice to install something works as it is printed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gmconv import packages
from gmconv.errors import UnavailableError

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (None, "'gmconv-deploy[serve]'"),
        ({"url": HERE.as_uri(), "dir_info": {"editable": True}}, f"-e '{HERE}[serve]'"),
        ({"url": HERE.as_uri(), "dir_info": {}}, f"'{HERE}[serve]'"),
        ({"url": Path(__file__).as_uri()}, f"'{__file__}[serve]'"),
        ({"url": "https://x.org/g", "vcs_info": {"vcs": "git"}}, "'gmconv-deploy[serve] @ git+https://x.org/g'"),
        ({"url": "https://x.org/a.whl", "archive_info": {}}, "'gmconv-deploy[serve] @ https://x.org/a.whl'"),
    ],
    ids=["index", "editable", "folder", "wheel", "git", "remote wheel"],
)
def test_the_advice_names_what_this_was_installed_from(
    record: Any, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(read_text=lambda _: record and json.dumps(record))
    monkeypatch.setattr(metadata.Distribution, "from_name", lambda _: found)
    assert packages.install("serve").endswith(f"pip install {wanted}")


def test_where_the_wheel_has_been_deleted_the_parts_of_the_extra_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(read_text=lambda _: json.dumps({"url": "file:///tmp/my%20wheels/a-1-py3-none-any.whl"}))
    monkeypatch.setattr(metadata.Distribution, "from_name", lambda _: found)
    monkeypatch.setattr(
        metadata,
        "requires",
        lambda _: ["a>=1; extra == 'rtx'", "gmconv-deploy[cuda]; extra == 'rtx'", 'b; extra == "cuda"', "c"],
    )
    assert packages.install("rtx").endswith("pip install 'a>=1' b")


def test_a_checkout_that_is_not_installed_is_named_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", nothing)
    root = HERE.parent.parent
    monkeypatch.chdir(tmp_path)
    assert packages.install("serve").endswith(f"pip install '{root}[serve]'")
    monkeypatch.chdir(root)
    assert packages.install("serve").endswith("pip install '.[serve]'")


def test_the_tool_is_the_one_that_reaches_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"pip", "onnxruntime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert packages.pip("timm") == "pip install timm"
    monkeypatch.delenv("VIRTUAL_ENV")
    assert packages.pip("timm") == f"{sys.executable} -m pip install timm"
    assert "export]" in packages.install("export")
    there.clear()
    assert packages.pip("timm") == f"uv pip install --python {sys.executable} timm"
    assert "[export,cpu]" in packages.install("export"), "every export runs ONNX Runtime"
    assert "[serve,cpu]" in packages.install("serve"), "a server of ONNX files needs it too"


def test_only_libraries_of_ours_are_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.missing(ModuleNotFoundError("No module named 'users'", name="users.own")) == ""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UnavailableError, match=r"jinja2 is not installed: .*\[report\]") as refusal:
        packages.require("jinja2")
    assert refusal.value.exit_code == 6


def test_a_name_of_the_package_says_how_to_install_what_it_needs() -> None:
    code = "import sys; sys.modules['torch'] = None; import gmconv; gmconv.convert"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UnavailableError: torch is not installed: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("module", "name"), [("sklearn.datasets", "scikit-learn"), ("PIL.Image", "pillow")])
def test_a_library_that_is_enough_alone_is_advised_alone(module: str, name: str) -> None:
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert packages.missing(error, module, "export").endswith(f" install {name}, which the extra export has too")
    assert packages.missing(error, module, "serve").endswith(", which the extra serve has too")


def test_a_folder_of_the_users_that_hides_ours_is_named(tmp_path: Path) -> None:
    hidden = tmp_path / "runtime"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise SystemExit('it ran')")
    for command in (["-m", "gmconv", "parity", "--help"], ["-c", "import gmconv; gmconv.deploy"]):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(HERE.parents[1])])}
        done = subprocess.run([sys.executable, *command], env=environment, cwd="/", capture_output=True, text=True)
        assert f"{hidden}: is found as the package 'runtime' and hides that of gmconv-deploy" in done.stderr
        assert "it ran" not in done.stderr


def test_versions_are_those_of_what_is_installed() -> None:
    assert packages.versions("numpy", "no-such-package") == {"numpy": metadata.version("numpy")}
