"""From a baked torch module to an ONNX graph that carries nothing of the machine it was made on."""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.graph.failure import why_not
from export.graph.traced import attributes_restored, reserved_renamed
from gmconv.errors import RefusedError, layer_words
from runtime.records import AxisRange

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import fx, nn

    from runtime.manifest import TensorSpec

SCOPES = "pkg.torch.onnx.name_scopes"
OLDEST_OPSET = 18  # the dynamo exporter writes no older one: asked for 17 it silently writes 18


@dataclass(frozen=True, slots=True)
class Exported:
    """The graph, the names of the network's parameters that an output depends on, and the program it was made from.

    `ranges`: of the free axes for which the program holds only within bounds: its forward asked for their lengths.
    """

    model: ir.Model
    parameters: frozenset[str]
    program: torch.export.ExportedProgram | None
    ranges: dict[str, AxisRange] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Axes:
    """Which axes of the input are free: the batch, and height and width."""

    batch: bool = True
    hw: bool = False


def to_onnx(
    model: nn.Module,
    examples: Mapping[str, torch.Tensor],
    *,
    output_names: Sequence[str],
    axes: Axes,
    opset: int,
    log: Path,
) -> Exported:
    """Export `model` (baked, eval mode) with `torch.onnx.export(dynamo=True)`; the result is cleaned and checked.

    Args:
        model: any module that maps tensors, or one, to tensors.
        examples: a batch of each argument of its forward, in order, by the name that the graph's input gets; two
            samples at least where the batch is dynamic (one would be specialised).
        output_names: of its outputs, in the order of `gmconv.outputs.named_outputs`.
        axes: the dynamic ones, named batch, height, width.
        opset: of the default domain.
        log: file that collects what the exporter prints.

    Raises:
        RefusedError: the network cannot be exported with these axes, or not as this opset.
        RuntimeError: the exporter lost a convolution.
    """
    import torch

    from gmconv.outputs import tensors_alone

    free = [_free(name, example, axes, alone=len(examples) == 1) for name, example in examples.items()]
    try:
        with captured(log), attributes_restored(model), reserved_renamed(model), tensors_alone(model):
            program = torch.onnx.export(
                model,
                tuple(examples.values()),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(examples),
                output_names=list(output_names),
                dynamic_shapes=_placed(model, free) if any(free) else None,
            )
    except Exception as error:  # the exporter raises its own types, torch.export's and plain ones
        raise RefusedError(why_not(error, model, hw=axes.hw)) from error
    if program is None:
        raise RefusedError("the exporter returned no program; what it printed, above unless -q, says why")
    graph_model = program.model
    written = graph_model.opset_imports.get("", 0)
    if written != opset:
        raise RefusedError(
            f"asked for opset {opset}, the installed torch writes {written} instead; say --opset {written}"
        )
    strip_metadata(graph_model)
    refuse_bfloat16(graph_model)
    keep_names_apart(graph_model)
    keep_pads_apart(graph_model)
    if program.exported_program is None:
        return Exported(graph_model, frozenset(name for name, _ in model.named_parameters()), None)
    needed, parameters = _needed(program.exported_program)
    require_convolutions(graph_model, _kernels(program.exported_program, needed, parameters))
    ranges = _ranges(program.exported_program, graph_model)
    return Exported(graph_model, frozenset(parameters.values()), program.exported_program, ranges)


def _placed(model: nn.Module, free: Sequence[Any]) -> tuple[Any, ...]:
    """What is said of each argument of the forward, in its order: a `*args` is one, and holds the rest."""
    from gmconv.inputs import forward_parameters

    kinds = [parameter.kind for parameter in forward_parameters(model)]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(free)
    before = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*free[:before], tuple(free[before:])) if len(free) > before else tuple(free)


def _ranges(program: torch.export.ExportedProgram, model: ir.Model) -> dict[str, AxisRange]:
    """The bounds of the free axes, by name: torch.export takes one branch of `if x.shape[0] > 16` and notes where.

    A lower bound of 0 to 2 is torch's own, not the network's.
    """
    given = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    found = {}
    for value, tensor in zip(model.graph.inputs, given, strict=False):
        for named, dim in zip(value.shape or (), tensor.shape, strict=False):
            bounds = program.range_constraints.get(getattr(getattr(dim, "node", None), "expr", None))
            if bounds is None or isinstance(named, int):
                continue
            low, high = (int(end) if end.is_Integer else None for end in (bounds.lower, bounds.upper))
            if high is not None or (low or 0) > 2:
                found[str(named.value)] = AxisRange(min=low if low and low > 2 else 1, max=high)
    return found


def _free(name: str, example: torch.Tensor, axes: Axes, *, alone: bool) -> dict[int, str]:
    """The names of an input's free axes: one batch for all, a height and width for each image."""
    free = {0: "batch"} if axes.batch else {}
    if axes.hw and example.ndim == 4 and example.is_floating_point():
        free |= {2: "height", 3: "width"} if alone else {2: f"{name}_height", 3: f"{name}_width"}
    return free


def strip_metadata(model: ir.Model) -> None:
    """Keep of the exporter's metadata only the module path of each node.

    The rest holds absolute paths and source lines of the exporting machine: a leak, and another file on every machine.
    """
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[SCOPES] = scopes
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.doc_string = None
    model.producer_name = "gmconv-deploy"
    model.producer_version = ""


def refuse_bfloat16(model: ir.Model) -> None:
    """Raise RefusedError where a layer computes in bfloat16, as under autocast: ONNX Runtime has no kernel for it."""
    for node in model.graph.all_nodes():
        dtype = node.outputs[0].dtype if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") else None
        if dtype is not None and dtype.name == "BFLOAT16":
            scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
            layer = next((name for name in reversed(scopes[:-1]) if name), "")
            raise RefusedError(
                f"{layer_words(layer)} computes in bfloat16 (autocast in its forward?), which ONNX Runtime does not; "
                f"let it compute in float32 and ask for --precision bf16 or fp16"
            )


def keep_pads_apart(model: ir.Model) -> None:
    """Have each Pad with zeros before a MaxPool pad with -0.0, which is the same number.

    ONNX Runtime (1.31) merges such a Pad into the MaxPool, whose own padding is minus infinity: another result. It only
    merges a Pad whose value has no bit set.
    """
    import numpy as np
    import onnx_ir

    for node in model.graph.all_nodes():
        if node.op_type != "Pad" or not _pooled(node) or node.attributes.get_string("mode", "constant") != "constant":
            continue
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value is not None:
            constant = onnx_ir.convenience.get_const_tensor(value)
            if constant is None or constant.numpy().any():
                continue
        dtype = next((v.dtype for v in (value, node.outputs[0], node.inputs[0]) if v is not None and v.dtype), None)
        if dtype is None or not dtype.is_floating_point():
            continue
        name = f"{node.outputs[0].name}_minus_zero"
        tensor = onnx_ir.tensor(np.array(-0.0, dtype=dtype.numpy()), name=name)
        minus = onnx_ir.Value(name=name, shape=onnx_ir.Shape([]), type=onnx_ir.TensorType(dtype), const_value=tensor)
        assert node.graph is not None
        node.graph.register_initializer(minus)
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, minus)


def _pooled(node: ir.Node) -> bool:
    """Whether a MaxPool reads what `node` makes, perhaps through a cast."""
    users = [user for value in node.outputs for user, _ in value.uses()]
    users += [user for cast in users if cast.op_type == "Cast" for value in cast.outputs for user, _ in value.uses()]
    return any(user.op_type == "MaxPool" for user in users)


def keep_names_apart(model: ir.Model) -> None:
    """Give a value or a weight inside the graph another name where it has that of an input or an output.

    An output is called as its network calls it ("relu", a dict's key), and so may be a node or a parameter.
    Raises RefusedError when an input and an output share a name.
    """
    ends = [*model.graph.inputs, *model.graph.outputs]
    names = [str(value.name) for value in ends]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise RefusedError(f"an input and an output are both called {twice[0]!r}; give --input-names another")
    weights = list(model.graph.initializers.values())
    inside = [*weights, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    taken = {str(value.name) for value in inside} | set(names)
    for value in inside:
        if value.name not in names or any(value is end for end in ends):
            continue
        name = next(new for i in itertools.count() if (new := f"{value.name}.inside{i or ''}") not in taken)
        taken.add(name)
        stored = any(value is weight for weight in weights)
        if stored:
            model.graph.initializers.pop(str(value.name), None)
        value.name = name
        if stored:
            model.graph.initializers[name] = value


def operator_histogram(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator, sorted by name."""
    counts = Counter(node.op_type for node in model.graph.all_nodes())
    return dict(sorted(counts.items()))


def require_convolutions(model: ir.Model, kernels: Mapping[str, torch.Tensor]) -> None:
    """Raise RuntimeError where the graph has fewer Conv nodes than the network uses different `kernels`.

    Not fewer than it runs: convolutions of one kernel on one input are merged, whatever names the kernel has.
    """
    from gmconv.certificate import tensor_sha256

    nodes = sum(node.op_type == "Conv" for node in model.graph.all_nodes())
    if nodes < len(kernels):
        different = len({tensor_sha256(kernel) for kernel in kernels.values()})
        if nodes < different:
            raise RuntimeError(f"the network runs {different} convolutions, the graph has {nodes}")


def unused_layers(exported: Exported, network: nn.Module, names: Iterable[str]) -> list[str]:
    """Of the named layers of `network` those of which no output needs a parameter: most never run."""
    parameters = dict(network.named_parameters(remove_duplicate=False))  # shared ones appear under one of their names
    used = {id(parameters[name]) for name in exported.parameters if name in parameters}
    known = {name for name, _ in network.named_modules()}
    return [
        name
        for name in names
        if name in known and all(id(p) not in used for p in network.get_submodule(name).parameters())
    ]


def idle_inputs(exported: ir.Model) -> list[str]:
    """The inputs that no node reads and no output is."""
    return [value.name or "" for value in exported.graph.inputs if not value.uses() and not value.is_graph_output()]


def _needed(program: torch.export.ExportedProgram) -> tuple[set[fx.Node], dict[str, str]]:
    """The nodes that an output depends on, and the parameters among them: node name -> parameter name."""
    needed = set(program.graph.find_nodes(op="output"))
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    names = program.graph_signature.inputs_to_parameters
    return needed, {node.name: names[node.name] for node in needed if node.name in names}


def _kernels(
    program: torch.export.ExportedProgram, needed: set[fx.Node], parameters: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The kernels, by parameter name, of needed convolutions that depend on the network's input.

    Not of transposed ones, which are another operator in ONNX, and not of those that compute from constants: they may
    be folded.
    """
    from_input: set[fx.Node] = set()
    found = {}
    for node in program.graph.nodes:
        given = node.name in program.graph_signature.user_inputs
        if not given and not any(source in from_input for source in node.all_input_nodes):
            continue
        from_input.add(node)
        operator = str(node.target)
        plain = re.fullmatch(r"aten\.(conv[123]d|convolution)\.\w+", operator) is not None
        transposed = operator.startswith("aten.convolution") and node.args[6]
        if node in needed and plain and not transposed and (name := parameters.get(node.args[1].name)):
            found[name] = program.state_dict[name]
    return found


def simplify(path: Path) -> None:
    """Rewrite the file with onnxslim. Raises UnavailableError when it is not installed."""
    from gmconv.cli import require

    slim = require("onnxslim", "export")
    slim.slim(str(path), str(path))


@contextmanager
def captured(log: Path) -> Iterator[None]:
    """Send what is written to file descriptors 1 and 2 meanwhile (also by C++ code and loggers) to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as stream, log.open("a") as text, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.raiseExceptions
        logging.raiseExceptions = False
        elsewhere = _handlers_off_descriptor_2()
        try:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            for handler in elsewhere:
                handler.setStream(text)
            yield
        finally:
            for handler, own in elsewhere.items():
                handler.setStream(own)
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
            logging.raiseExceptions = previous


def _handlers_off_descriptor_2() -> dict[logging.StreamHandler[Any], Any]:
    """Log handlers that write to a stderr of their host's, as in a notebook, and that stream."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    handlers = [handler for logger in (logging.root, *loggers) for handler in logger.handlers]
    streams = [handler for handler in handlers if type(handler) is logging.StreamHandler]
    return {handler: handler.stream for handler in streams if handler.stream not in (sys.__stdout__, sys.__stderr__)}


def specs(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The graph's inputs and outputs. Raises RefusedError when the exporter left a type open."""
    from runtime.manifest import TensorSpec

    def spec(value: ir.Value) -> TensorSpec:
        if value.dtype is None or value.shape is None:
            raise RefusedError(f"the exporter could not infer the type of {value.name!r}")
        shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        return TensorSpec(str(value.name), str(value.dtype.numpy()), shape)

    return tuple(spec(v) for v in model.graph.inputs), tuple(spec(v) for v in model.graph.outputs)
