"""`python -m tests.bench.write NAME [ARGUMENTS]`: run a bench and put what it prints into its block of the README here.

No figure of that file is typed by hand: a bench that fails changes nothing in it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from itertools import groupby
from pathlib import Path

from tests.bench.readme import BENCH_README, write_block


def main() -> int:
    """Run `python -m tests.bench.NAME`, show its output as it comes, and write the block once it has succeeded."""
    name, *arguments = sys.argv[1:]
    command = ["python", "-m", f"tests.bench.{name}", *arguments]
    with subprocess.Popen([sys.executable, *command[1:]], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if child.returncode == 0:
        write_block(
            BENCH_README, name.replace("_", "-"), [f"`{' '.join(command)}`; {conditions()}", "", *fenced(lines)]
        )
    return child.returncode


def fenced(lines: list[str]) -> list[str]:
    """`lines` as code blocks; Markdown tables among them stay tables."""
    result: list[str] = []
    for table, group in groupby(lines, lambda line: line.startswith("|")):
        part = list(group)
        result += ["", *part, ""] if table else ["```text", *part, "```"]
    return result


def conditions() -> str:
    """When and on what: date, processor, packages."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime", "tensorrt-rtx"))
    return f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores of {cpu}, {packages}"


if __name__ == "__main__":
    sys.exit(main())
