"""The steps, in the order in which a run that is cut short proves the most."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.proof.rows import Recorder


@dataclass(frozen=True, slots=True)
class Step:
    """A file of this package with a function `run(context, recorder)`, and the seconds it may take on a card."""

    name: str
    title: str
    limit: int
    module: str

    def run(self, context: Context, recorder: Recorder) -> None:
        """In this process."""
        importlib.import_module(f"tests.gpu.proof.{self.module}").run(context, recorder)


STEPS = (
    Step("driver", "copies, events, graphs, and an engine's whole path with a kernel for an engine", 60, "driver"),
    Step("parity", "the trained network in torch: masks, baking, TF32, autocast, the float64 yardstick", 90, "parity"),
    Step("latency", "live, baked, twin and cropped in torch, each eager, as a CUDA graph and compiled", 170, "latency"),
    Step("engines", "engines against the live network; graphs, contexts, threads, memory", 180, "engines"),
    Step("comparison", "engine against the live network, interleaved, in one clock", 110, "comparison"),
    Step("serving", "first start, clients, reload, a full card, SIGTERM", 90, "serving"),
    Step("providers", "ONNX Runtime on CUDA; Torch-TensorRT-RTX as the anchor", 45, "providers"),
    Step("accuracy", "GMConv and its plain twin trained on photographs; int8 and fp8", 120, "accuracy"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every step is told.

    `work`: a folder for what the steps make, shared by them and kept between runs. `artefacts`: what was made
    beforehand, or None. `images`: photographs for `accuracy`, or None. `rehearse`: on the CPU, with stand-ins.
    """

    work: Path
    artefacts: Path | None = None
    images: Path | None = None
    rehearse: bool = False

    @property
    def device(self) -> str:
        """Where torch computes."""
        return "cpu" if self.rehearse else "cuda:0"


def find(names: str | None) -> tuple[Step, ...]:
    """Steps by name, in the order of `STEPS`. Raises ValueError for a name that is none."""
    if not names:
        return STEPS
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = sorted(set(asked) - {step.name for step in STEPS})
    if unknown or not asked:
        raise ValueError(f"no step {', '.join(unknown) or names!r}; the steps are {', '.join(s.name for s in STEPS)}")
    return tuple(step for step in STEPS if step.name in asked)
