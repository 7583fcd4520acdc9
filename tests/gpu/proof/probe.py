"""`python -m tests.gpu.proof.probe PLAN`: open an engine and run it once, in a process that it may take down.

An engine that TensorRT-RTX calls invalid is tried all the same; if that crashes, the rows of the others must not go
with it. Exit 0, or the code of our own errors with their words on stderr.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from gmconv.errors import RefusedError, UnavailableError
from runtime.runners import open_runner

SECONDS = 60


def problem(plan: Path) -> str | None:
    """Why this machine or this TensorRT does not take the engine; None where it runs. Asked once for each file.

    Raises RuntimeError where the engine ended its process, or failed in a way that is not ours.
    """
    answer = plan.with_name(plan.name + ".probe")
    if not answer.exists():
        command = [sys.executable, "-m", "tests.gpu.proof.probe", str(plan)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        words = done.stderr.strip().splitlines()[-1:] or [""]
        if done.returncode < 0:
            raise RuntimeError(f"running it ended its process with {signal.Signals(-done.returncode).name}: {words[0]}")
        if done.returncode not in (0, RefusedError.exit_code, UnavailableError.exit_code):
            raise RuntimeError(f"running it failed: {words[0]}")
        answer.write_text(words[0] if done.returncode else "")
    return answer.read_text() or None


if __name__ == "__main__":
    try:
        with open_runner(sys.argv[1], "cuda:0") as runner:
            runner.warm_up()
    except (RefusedError, UnavailableError) as error:
        print(" ".join(error.message.split()), file=sys.stderr)
        sys.exit(error.exit_code)
