"""The run itself: steps one after another, each in a process of its own with a time limit of its own.

Not in `__main__`, whose functions a process that is started afresh would not find.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import click

from tests.gpu.proof.rows import Recorder, Row, append, read, say
from tests.gpu.proof.steps import Context, Step

MACHINE = Step("machine", "the GPU, its driver, the versions", 60, "machine")
#: A step that could not have more than this many seconds is not started.
LEAST = 5.0
#: A step stops starting checks so many seconds before it is ended.
MARGIN = 3.0
#: A rehearsal may share its machine with others: so many times a step's limit.
REHEARSED = 4
#: Imported once, before the children are forked: each would take seconds in every one of them. None touches CUDA,
#: which does not survive a fork.
PRELOAD = ("numpy", "torch", "torch.onnx", "onnx", "onnxscript")


def run_all(chosen: tuple[Step, ...], context: Context, out: Path, budget: float) -> None:
    """The machine first, then the steps, until the budget is spent; results are appended to `out`/proof.jsonl."""
    rows, log = out / "proof.jsonl", out / "log.txt"
    end = time.monotonic() + budget
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU then leaves a fork possible
    for module in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    method = "fork"
    before = len(read(rows))
    run_step(MACHINE, context, rows, log, MACHINE.limit, method)
    if not context.rehearse and no_card(read(rows)[before:]):
        method = "spawn"  # perhaps a driver that a fork has broken, after all
        run_step(MACHINE, context, rows, log, MACHINE.limit, method)
        problem = no_card(read(rows)[before:])
        if problem:
            for step in chosen:
                append(rows, Row(step=step.name, what="step", status="missing", detail=problem))
            return
    for step in chosen:
        left = end - time.monotonic()
        if left < LEAST:
            append(rows, Row(step=step.name, what="step", status="not run", detail="the budget was spent before it"))
            continue
        limit = step.limit * (REHEARSED if context.rehearse else 1)
        run_step(step, context, rows, log, min(limit, left), method)


def no_card(rows: list[Row]) -> str:
    """Why the step "machine" found no card; empty where it found one."""
    if any(row.status == "measured" for row in rows):
        return ""
    return next((row.detail for row in reversed(rows) if row.what == "machine"), "the machine could not be asked")


def run_step(step: Step, context: Context, rows: Path, log: Path, seconds: float, method: str) -> None:
    """One step in a process group of its own, ended with all it started when its time is over; a row sums it up."""
    before = len(read(rows))
    began = time.monotonic()
    child = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=work_on, args=(step, context, rows, log, max(LEAST, seconds - MARGIN))
    )
    child.start()
    child.join(seconds)
    ended = child.is_alive()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid or -1, signal.SIGKILL)  # with what it left behind
    child.kill()
    child.join(10)
    spent = time.monotonic() - began
    found = Counter(row.status for row in read(rows)[before:])
    words = ", ".join(f"{count} {status}" for status, count in found.items()) or "nothing"
    if ended:
        status, detail = "failed", f"ended after {spent:.0f} s, its limit; until then: {words}"
    elif child.exitcode:
        status, detail = "failed", f"its process ended with status {child.exitcode}; until then: {words}"
    else:
        status, detail = "failed" if found["failed"] else "passed", words
    append(rows, Row(step=step.name, what="step", status=status, detail=detail, seconds=round(spent, 1)))  # type: ignore[arg-type]
    click.echo(f"{step.name}: {status} in {spent:.0f} s: {detail}", err=True)


def work_on(step: Step, context: Context, rows: Path, log: Path, seconds: float) -> None:
    """In the child: everything it prints goes to the log."""
    os.setpgid(0, 0)
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    print(f"\n=== {step.name}", flush=True)
    recorder = Recorder(rows, step.name, time.monotonic() + seconds)
    try:
        with contextlib.ExitStack() as stack:
            if context.rehearse:
                from tests.gpu.proof.standin_torch import stand_in

                stack.enter_context(stand_in())
            step.run(context, recorder)
    except Exception as error:
        traceback.print_exc()
        recorder.add("the step itself", "failed", say(error))
    sys.stdout.flush()
    sys.stderr.flush()
