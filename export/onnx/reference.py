"""What the network computes in torch: as trained, baked, and in float64; the reference of an export's proof.

`python -m export.onnx.reference` is the child of `export.onnx.process`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np

from export.onnx.rows import rows_apart
from gmconv.certificate import BakeCertificate
from gmconv.errors import RefusedError
from runtime.runners.base import Array

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.onnx.cases import Case
    from export.onnx.options import ExportOptions
    from gmconv.inputs import Input

Outputs = dict[str, Array]
Feeds = dict[str, Array]
_LARGE = 2**30  # bytes of weights from which memory matters more than the seconds that two processes save
_SPARE = 2**27  # up to which a second copy is nothing


def is_large(model: nn.Module, limit: int = _LARGE) -> bool:
    """Whether the reference should run after the export instead of beside it, so that one copy is held at a time."""
    return sum(parameter.nbytes for parameter in model.parameters()) >= limit


@dataclass(frozen=True, slots=True)
class Reference:
    """What the network computed as trained (`live`), once baked (`baked`), in float64 (`yardstick`), case by case.

    `alone`: live, each sample run by itself, where the yardstick says that one run tells too little of fp32.
    `rounded`: baked, with the rounding of each lower precision; of the yardstick's cases. `weights`: the same with what
    does not come from the input rounded alone, `eight` the layers whose weights were in 8 bits then. `notes`: what a
    reader of the proof should know. `apart`: see `export.onnx.rows.rows_apart`.
    """

    live: tuple[Outputs, ...]
    baked: tuple[Outputs, ...]
    yardstick: tuple[Outputs, ...]
    certificate: BakeCertificate
    notes: tuple[str, ...] = ()
    rounded: Mapping[str, tuple[Outputs, ...]] = field(default_factory=dict)
    alone: tuple[Outputs, ...] = ()
    weights: Mapping[str, tuple[Outputs, ...]] = field(default_factory=dict)
    eight: Mapping[str, frozenset[str]] = field(default_factory=dict)
    apart: float = 0.0


@dataclass(frozen=True, slots=True)
class Said:
    """What the child says besides arrays."""

    certificate: BakeCertificate
    notes: tuple[str, ...]
    eight: Mapping[str, frozenset[str]]
    apart: float


def weights_name(precision: str) -> str:
    """What the outputs with rounded weights are called on the disk."""
    return f"{precision}-weights"


def save_arrays(path: Path, outputs: Outputs) -> None:
    """Outputs or inputs, in their order, as an .npz file."""
    np.savez(path, names=np.array(list(outputs)), *outputs.values())  # noqa: B026 (an output may be called "file")


def load_arrays(path: Path) -> Outputs:
    """What `save_arrays` wrote; nothing where it wrote nothing."""
    if not path.exists():
        return {}
    with np.load(path) as archive:
        return {str(name): archive[f"arr_{index}"] for index, name in enumerate(archive["names"])}


def bitwise(left: Outputs, right: Outputs) -> bool:
    """Whether they are the same, bit for bit."""
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def run_torch(model: nn.Module, inputs: Sequence[Input], cases: Sequence[Case], names: Sequence[str]) -> list[Outputs]:
    """Every case through a torch network, in its own precision."""
    return [_attempt(model, inputs, case.feeds, names, probe=case.probe) for case in cases]


def _attempt(model: nn.Module, inputs: Sequence[Input], feeds: Feeds, names: Sequence[str], *, probe: bool) -> Outputs:
    """What the network returns; of a probe that it does not take, nothing."""
    from gmconv.cli import of_the_machine
    from gmconv.inputs import does_not_run

    try:
        return _run(model, inputs, feeds, names)
    except Exception as error:  # whatever a forward raises at a size that it was not made for
        if probe:
            return {}
        if isinstance(error, RefusedError) or of_the_machine(error):
            raise
        batch = len(next(iter(feeds.values())))
        raise does_not_run(model, inputs, error, batch, "give --batch N where it takes one size alone") from error


def _run(
    model: nn.Module, inputs: Sequence[Input], feeds: Feeds, names: Sequence[str], dtype: torch.dtype | None = None
) -> Outputs:
    import torch

    from gmconv.eager import as_written
    from gmconv.inputs import tensors_of
    from gmconv.outputs import named_outputs

    with torch.no_grad(), as_written():
        outputs = model(*tensors_of(model, inputs, feeds, dtype))
    return {name: tensor.detach().numpy() for name, tensor in named_outputs(outputs, names).items()}


def _run_double(model: nn.Module, inputs: Sequence[Input], feeds: Feeds, names: Sequence[str]) -> Outputs:
    import torch

    from gmconv.double import double_precision

    with double_precision():
        return _run(model, inputs, feeds, names, torch.float64)


@dataclass(frozen=True, slots=True)
class Work:
    """What to run: batches of every input, the names of the outputs, which are noise, for the yardstick, or probes.

    `bake_options`: keyword arguments of `gmconv.constants.bake_for_inputs`; `precisions`: whose rounding to run too;
    `reduced`: int8 weights have 7 bits; `kept`: wildcards over the layers that stay above 8 bits.
    """

    feeds: tuple[Feeds, ...]
    names: tuple[str, ...]
    noise: frozenset[int]
    yardstick: frozenset[int]
    probes: frozenset[int]
    bake_options: dict[str, Any]
    precisions: tuple[str, ...] = ()
    reduced: bool = False
    kept: tuple[str, ...] = ()


def work_on(cases: Sequence[Case], names: Sequence[str], options: ExportOptions) -> Work:
    """The cases as `Work`."""
    return Work(
        feeds=tuple(case.feeds for case in cases),
        names=tuple(names),
        noise=frozenset(index for index, case in enumerate(cases) if case.noise),
        yardstick=frozenset(index for index, case in enumerate(cases) if case.yardstick),
        probes=frozenset(index for index, case in enumerate(cases) if case.probe),
        bake_options=options.bake_options,
        precisions=tuple(precision for precision in options.precisions if precision != "fp32"),
        reduced=options.calibrated.target == "cpu",
        kept=options.calibrated.kept,
    )


def compute_reference(model: nn.Module, inputs: Sequence[Input], work: Work) -> Reference:
    """Run the live network on every batch, in float64 too, bake it in place, and run it again."""
    import torch

    from gmconv.constants import bake_for_inputs
    from gmconv.constants.network import THREADS
    from gmconv.surgery import copied

    before, notes = torch.get_num_threads(), []
    kept = None if is_large(model, _SPARE) else copied(model)

    def run(network: nn.Module, index: int, threads: int) -> Outputs:
        torch.set_num_threads(threads)
        return _attempt(network, inputs, work.feeds[index], work.names, probe=index in work.probes)

    def threads(index: int) -> int:
        # Noise is few samples, done while the exporter needs the other half; the images are what the export waits for.
        # One case has as many threads live as baked: bits may depend on them.
        return THREADS if index in work.noise else os.cpu_count() or 1

    def run_double() -> tuple[Outputs, ...]:
        torch.set_num_threads(THREADS)
        return tuple(
            _run_double(model, inputs, feeds, work.names) if index in work.yardstick else {}
            for index, feeds in enumerate(work.feeds)
        )

    try:
        live = [run(model, index, threads(index)) for index in range(len(work.feeds))]
        yardstick: tuple[Outputs, ...] | None = None
        try:
            yardstick = run_double()
        except Exception as error:  # whatever a forward does that only knows float32
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            notes.append(
                f"the float64 yardstick is the baked network, as the live one does not run in float64 ({reason})"
            )
        apart = _rows_apart(model, inputs, work)
        model, certificate = bake_for_inputs(model, inputs, **work.bake_options)
        try:
            yardstick = run_double() if yardstick is None else yardstick
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RefusedError(
                f"the network runs in float64 neither live nor baked, so its proof has no yardstick ({reason}): "
                f"let the dtypes of its forward follow its input"
            ) from error
        baked = [run(model, index, threads(index)) for index in range(len(work.feeds))]
        for index in range(len(work.feeds)):
            if kept is not None and not bitwise(live[index], baked[index]):  # kernels made by LAPACK follow the threads
                live[index], baked[index] = run(kept, index, THREADS), run(model, index, THREADS)
        alone = _alone(model, inputs, work, live, yardstick)
        rounded, weights, eight = _rounded(model, work, lambda index: run(model, index, THREADS))
    finally:
        torch.set_num_threads(before)
    return Reference(
        tuple(live), tuple(baked), yardstick, certificate, tuple(notes), rounded, alone, weights, eight, apart
    )


def _rows_apart(model: nn.Module, inputs: Sequence[Input], work: Work) -> float:
    """`rows_apart` of the live network, on the noise and on what is real among the cases."""
    runs = [lambda feeds: _run(model, inputs, feeds, work.names)]
    if not is_large(model):
        runs.insert(0, lambda feeds: _run_double(model, inputs, feeds, work.names))
    cases = [(feeds, index in work.noise) for index, feeds in enumerate(work.feeds) if index not in work.probes]
    return rows_apart(runs, [feeds for feeds, noise in cases if noise], [feeds for feeds, noise in cases if not noise])


def _rounded(
    model: nn.Module, work: Work, run: Callable[[int], Outputs]
) -> tuple[dict[str, tuple[Outputs, ...]], dict[str, tuple[Outputs, ...]], dict[str, frozenset[str]]]:
    """The yardstick's cases with the rounding of each lower precision, and of its weights alone; see `Reference`."""
    from export.graph.read import selects
    from gmconv.rounding import Rounding

    def run_all() -> tuple[Outputs, ...]:
        return tuple(run(i) if i in work.yardstick else {} for i in range(len(work.feeds)))

    names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    kept = {key for key, name in names.items() if any(selects(pattern, name) for pattern in work.kept)}
    rounded, weights, eight = {}, {}, {}
    for precision in work.precisions:
        with Rounding(precision, reduced=work.reduced):
            rounded[precision] = run_all()
        alone = Rounding(precision, weights_only=True, reduced=work.reduced, kept=kept)
        with alone as mode, model.register_forward_pre_hook(mode.follow):
            weights[precision] = run_all()
        eight[precision] = frozenset(names[key] for key in mode.rounded & names.keys())
    return rounded, weights, eight


def _alone(
    model: nn.Module, inputs: Sequence[Input], work: Work, live: Sequence[Outputs], yardstick: Sequence[Outputs]
) -> tuple[Outputs, ...]:
    """Each sample by itself, of the cases where one fp32 run tells too little of how far fp32 is from float64."""
    from runtime.parity.yardstick import Yardstick, one_by_one

    return tuple(
        one_by_one(lambda case: _run(model, inputs, case, work.names), feeds)
        if Yardstick().wants_more(wide, found)
        else {}
        for feeds, found, wide in zip(work.feeds, live, yardstick, strict=True)
    )


def _serve(folder: Path) -> None:
    """The child's work: a task on stdin, `input.*.npz` in `folder`; writes `live.*`, `baked.*`, ... there."""
    import gmconv

    task = json.load(sys.stdin)
    feeds = tuple(load_arrays(folder / f"input.{index}.npz") for index in range(task["count"]))
    loaded = gmconv.load_checkpoint(task["checkpoint"], **task["load_options"])
    work = replace(msgspec.convert(task["work"], Work), feeds=feeds)
    found = compute_reference(loaded.model, loaded.inputs, work)
    hops = {"live": found.live, "baked": found.baked, "yardstick": found.yardstick, "alone": found.alone}
    hops |= {**found.rounded, **{weights_name(precision): outputs for precision, outputs in found.weights.items()}}
    for hop, cases in hops.items():
        for index, outputs in enumerate(cases):
            if outputs:
                save_arrays(folder / f"{hop}.{index}.npz", outputs)
    said = Said(found.certificate, found.notes, found.eight, found.apart)
    (folder / "said.json").write_bytes(msgspec.json.encode(said))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Compute a reference (internal: run by `ReferenceProcess`)."""
    _serve(folder)


if __name__ == "__main__":
    main()
