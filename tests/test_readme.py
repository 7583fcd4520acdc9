"""The README names commands, flags, targets and files that exist."""

from __future__ import annotations

import re
import subprocess
import sys
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


@pytest.mark.parametrize("command", [*COMMANDS, *INLINE])
def test_every_command_and_flag_exists(command: str) -> None:
    module = command.split()[2]
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
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
    for link in links:
        assert (ROOT / link).exists(), link
