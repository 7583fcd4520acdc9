"""The graph's inputs and outputs by name, found by running the network once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from export.onnx.options import ExportOptions
from gmconv.errors import RefusedError
from gmconv.foreign import Foreign, refuse_labels
from runtime.manifest import TensorSpec

if TYPE_CHECKING:
    import torch

    from gmconv import Checkpoint


def input_names(loaded: Checkpoint, options: ExportOptions) -> list[str]:
    """The graph's: those asked for, else the network's own ("input" where it has one)."""
    own = [given.name for given in loaded.inputs]
    if options.input_names and len(options.input_names) != len(own):
        raise RefusedError(
            f"the network takes {len(own)} inputs ({', '.join(own)}), {len(options.input_names)} names were given"
        )
    return list(options.input_names) or own


def output_specs(
    loaded: Checkpoint, options: ExportOptions, foreign: Foreign, *, in_memory: bool = False
) -> tuple[list[TensorSpec], list[str]]:
    """The graph's, from one run, axes that are free by name; and notes on what the network returns besides tensors.

    `foreign`: as it was given. Raises RefusedError when the network does not run on its inputs, or computes with what
    its checkpoint lacks, or when there are labels for another number of classes.
    """
    import torch

    from gmconv.checkpoint.unsaved import saved_alone
    from gmconv.inputs import does_not_run
    from gmconv.outputs import left_out, named_outputs, refuse_unshippable

    given = examples(loaded, options)
    checked = contextlib.nullcontext() if in_memory else saved_alone(loaded.model)
    try:
        with torch.no_grad(), checked:
            outputs = loaded.model(*(example[:1] if options.batch is None else example for example in given))
    except RefusedError:
        raise
    except Exception as error:  # an assertion, a shape, an argument that is missing
        advice = "check --input-shape, or give each input as --input NAME:SHAPE[:DTYPE]"
        raise does_not_run(loaded.model, loaded.inputs, error, options.batch, advice) from error
    named = named_outputs(outputs, options.output_names)
    refuse_unshippable(named)
    refuse_labels(loaded.labels, [tuple(tensor.shape) for tensor in named.values()], foreign)
    others = left_out(outputs)
    specs = []
    for name, tensor in named.items():
        sides = [f"{name}_{axis}" if options.dynamic_hw and axis > 1 else n for axis, n in enumerate(tensor.shape)]
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), ("batch", *sides[1:])))
    return specs, [f"not in the graph, as they are no tensors: {', '.join(others)}"] * bool(others)


def examples(loaded: Checkpoint, options: ExportOptions) -> tuple[torch.Tensor, ...]:
    """Noise for the exporter: two samples where the batch is free."""
    from gmconv.inputs import noise, tensors_of

    return tensors_of(loaded.model, loaded.inputs, noise(loaded.inputs, options.batch or 2))
