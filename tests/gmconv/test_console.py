"""The console script `gmconv`: every command, from any folder, whatever lies there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gmconv.__main__ import COMMANDS, main

SCRIPT = Path(sys.executable).with_name("gmconv")
TRAP = "raise SystemExit('the folder of the user was imported')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with packages of our names, and a network of their own."""
    for name in ("export", "runtime", "gmconv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(TRAP)
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(1))\n"
    )
    return tmp_path


def gmconv(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([SCRIPT, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_help_lists_every_command_and_imports_none() -> None:
    script = (
        "import sys\nfrom gmconv.__main__ import main\n"
        "try: main(['-h'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'export', 'runtime'} & set(sys.modules), sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_short_help_a_version_and_an_example(name: str) -> None:
    import click

    command = main.get_command(click.Context(main), name)  # type: ignore[attr-defined]
    assert command.example.startswith(f"gmconv {name} ")
    assert {"-h", "--help"} <= set(command.get_help_option_names(click.Context(command, **command.context_settings)))
    assert "--version" in [option for parameter in command.params for option in parameter.opts]


def test_an_example_is_accepted_by_its_own_command() -> None:
    import click

    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)  # type: ignore[attr-defined]
        command.make_context(name, command.example.split()[2:])


def test_it_exports_from_a_folder_with_packages_of_the_same_names(folder: Path) -> None:
    saved = "import torch, mynets; torch.save(mynets.make().state_dict(), 'net.pth')"
    subprocess.run([sys.executable, "-c", saved], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": ""})
    done = gmconv("onnx", "net.pth", "--arch", "mynets:make", "--input-shape", "3,8,8", "-q", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "net.onnx.json").is_file()


def test_errors_have_the_exit_codes_of_the_single_commands(folder: Path) -> None:
    assert gmconv("onnx", "nowhere.pt", folder=folder).returncode == 3
    assert gmconv("nonsense", folder=folder).returncode == 2
    assert gmconv("--version", folder=folder).stdout.startswith("gmconv-deploy ")
    assert "gmconv onnx" in gmconv("onnx", "-h", folder=folder).stdout


def test_the_shell_completes_commands_and_options(folder: Path) -> None:
    for line, expected in (("gmconv pari", "parity"), ("gmconv onnx --input-sh", "--input-shape")):
        environment = {**os.environ, "_GMCONV_COMPLETE": "bash_complete", "COMP_WORDS": line}
        environment["COMP_CWORD"] = str(len(line.split()) - 1)
        done = subprocess.run([SCRIPT], cwd=folder, env=environment, capture_output=True, text=True)
        assert expected in done.stdout, done.stderr
