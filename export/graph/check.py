"""The last look at a converted graph before it gets its name, and the writing of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.graph.read import layer_upstream, value_types
from gmconv.errors import RefusedError
from runtime.metadata import misfit
from runtime.runners.base import Array, numpy_dtype
from runtime.runners.qdq import graph_options

if TYPE_CHECKING:
    from onnx import ModelProto

    from gmconv.preprocessing import Preprocessing
    from runtime.artefact import Facts
    from runtime.manifest import Manifest, TensorSpec

_EXTERNAL_ABOVE = 2**31 - 2**20
_SAMPLES = 8
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}

Feeds = Mapping[str, Array]


def image_shape(model: ModelProto, facts: Facts, data: str | Path) -> tuple[int | None, tuple[int, int, int]]:
    """Batch (None: dynamic) and (C, H, W) of the graph's only image input, for what is judged on images.

    Free sides are those of `runtime.runners.feeds.sized`. Raises RefusedError when the graph has several inputs or no
    (N, C, H, W) input with known C, H and W.
    """
    from runtime.runners.feeds import sized, sizeless

    inputs, _ = tensor_specs(model)
    if len(inputs) != 1:
        raise RefusedError(f"the graph has {len(inputs)} inputs; a budget is judged on networks with one image input")
    dims = [side if isinstance(side, int) else None for side in sized(inputs, facts, data)[0].shape]
    if len(dims) != 4:
        raise RefusedError(f"input {inputs[0].name!r} has shape {dims}; a budget is judged on images (N, C, H, W)")
    if not all(dims[1:]):
        raise RefusedError(sizeless(inputs[0]))
    return dims[0], (dims[1] or 0, dims[2] or 0, dims[3] or 0)


@dataclass(frozen=True, slots=True)
class Overflow:
    """The first tensor that is NaN or infinite, on what, the layer it comes out of, and the nodes to keep in fp32."""

    tensor: str
    seen_on: str
    layer: str
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"layer {self.layer!r} overflows on {self.seen_on} (tensor {self.tensor!r} is NaN or infinite)"


def check_and_run(
    model: ModelProto,
    precision: str,
    samples: Sequence[Feeds] = (),
    preprocessing: Preprocessing | None = None,
) -> Overflow | None:
    """Run onnx.checker in full, open the graph in ONNX Runtime on the CPU and run it, rounding between the operators.

    ONNX Runtime computes fp16 ops in fp32 on the CPU and drops the rounding between two of them, and with it an
    overflow that a GPU would have: fetching every fp16 and bf16 tensor makes it round.

    Args:
        model: the converted graph.
        precision: in words, for messages.
        samples: real inputs, batches by input name: the eight samples with the largest values are run.
        preprocessing: of images; noise of 8-bit pixels is run as it comes out of it, beside unit noise.

    Returns:
        The first overflow; None where every tensor is finite.

    Raises:
        RefusedError: an op has no kernel in this precision, or ONNX Runtime cannot run the graph.
    """
    import onnx

    if model.ByteSize() < _EXTERNAL_ABOVE:
        onnx.checker.check_model(model, full_check=True)
    tapped, names = _tap(model)
    session = _open(tapped, precision)
    fetched = [*names, *(value.name for value in model.graph.output)]
    for seen_on, feeds in _feeds(session.get_inputs(), samples, preprocessing):
        try:
            arrays = session.run(fetched, feeds)
        except Exception as error:  # ONNX Runtime raises its own pybind classes
            raise RefusedError(f"ONNX Runtime cannot run the {precision} graph{_of_node(error)}") from error
        for name, array in zip(fetched, arrays, strict=True):
            if not np.isfinite(array.astype(np.float32)).all():
                return _overflow(model, names.get(name, name), seen_on)
    return None


def tensor_specs(model: ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a graph as a manifest describes them."""
    from onnx import TensorProto, helper

    from runtime.manifest import TensorSpec

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
        bf16 = tensor.elem_type == TensorProto.BFLOAT16
        dtype = "bfloat16" if bf16 else str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return TensorSpec(value.name, dtype, shape)

    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(spec(value) for value in model.graph.input if value.name not in constants)
    return inputs, tuple(spec(value) for value in model.graph.output)


def bare_manifest(path: Path, model: ModelProto) -> Manifest:
    """A manifest for an ONNX file that came without one."""
    from runtime.manifest import Manifest, digest

    inputs, outputs = tensor_specs(model)
    return Manifest(artefact=digest(path, "onnx"), inputs=inputs, outputs=outputs)


def save_graph(model: ModelProto, output: Path, manifest: Manifest, *, external: bool = False) -> Manifest:
    """Write `output`, its external data where asked (or needed: 2 GiB) and its manifest, in a folder of `staged`."""
    import onnx
    import onnxruntime

    from runtime.manifest import digest_onnx, sidecar, utc_now

    external = external or model.ByteSize() >= _EXTERNAL_ABOVE
    if external:
        onnx.save(model, output, save_as_external_data=True, location=f"{output.name}.data", size_threshold=1024)
    else:
        onnx.save(model, output)
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    artefact, *data = digest_onnx(output)
    manifest = replace(
        manifest,
        artefact=artefact,
        external=tuple(data),
        created=utc_now(),
        versions=manifest.versions | versions,
    )
    sidecar(output).write_text(manifest.to_json())
    return manifest


def _open(model: ModelProto, precision: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    graph_options(precision, None).apply(options, ort)
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own pybind classes
        found = re.search(r"Could not find an implementation for (\S+?)\(\d+\) node with name '([^']*)'", str(error))
        if found:
            raise RefusedError(
                f"node {found[2]!r}: {found[1]} has no {precision} kernel; --keep-fp32 {found[2]} leaves it in fp32"
            ) from error
        raise RefusedError(f"ONNX Runtime refuses the {precision} graph{_of_node(error)}") from error


def _of_node(error: Exception) -> str:
    """What ONNX Runtime says in one line, after the node it names, under the graph's own name for it."""
    text = " ".join(str(error).split())
    node = re.search(r"[Nn]ode[^']{0,20}'(?:InsertedPrecisionFreeCast_)?([^']+?)(?:_nchwc)?'", text)
    said = re.sub(r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )?", "", text)
    return f" (node {node[1]!r}): {said[:300]}" if node else f": {said[:300]}"


def _feeds(
    inputs: Sequence[Any], samples: Sequence[Feeds], preprocessing: Preprocessing | None
) -> Iterator[tuple[str, Feeds]]:
    """Unit noise, noise of pixels, and the largest samples, one by one unless the graph's batch is fixed."""
    shapes = {value.name: tuple(value.shape) for value in inputs}
    known = {name: array.shape for feeds in samples[:1] for name, array in feeds.items()}
    size = preprocessing.size if preprocessing is not None else (64, 64)
    dtypes = {value.name: _DTYPES.get(value.type) for value in inputs}
    generator = np.random.default_rng(0)

    def filled(name: str) -> tuple[int, ...]:
        guess = known.get(name, (1, 1, *size) if len(shapes[name]) == 4 else (1,) * len(shapes[name]))
        return tuple(
            d if isinstance(d, int) else 1 if axis == 0 else guess[axis] for axis, d in enumerate(shapes[name])
        )

    def typed(name: str, array: Array) -> Array:
        return array.astype(numpy_dtype(dtypes[name] or str(array.dtype)))

    noise = {name: generator.standard_normal(filled(name)) for name in shapes}
    if all(dtypes.values()):
        yield "unit noise", {name: typed(name, array) for name, array in noise.items()}
    if preprocessing is not None and all(dtypes.values()) and len(shapes) == 1:
        ((name, shape),) = ((name, filled(name)) for name in shapes)
        if len(shape) == 4 and not misfit(preprocessing, shape):
            mean, std = (np.reshape(v, (-1, 1, 1)) for v in (preprocessing.mean, preprocessing.std))
            pixels = generator.integers(0, 256, shape) * preprocessing.scale
            yield "noise of pixels", {name: typed(name, (pixels - mean) / std)}
    rows: list[Feeds] = [{n: a[i : i + 1] for n, a in feeds.items()} for feeds in samples for i in _rows(feeds)]
    if any(isinstance(shape[0], int) and shape[0] > 1 for shape in shapes.values() if shape):
        rows = list(samples)
    rows.sort(key=lambda feeds: -max(float(np.abs(array).max(initial=0)) for array in feeds.values()))
    for feeds in rows[:_SAMPLES]:
        yield "the images", {name: typed(name, array) for name, array in feeds.items()}


def _rows(feeds: Feeds) -> range:
    return range(min(len(array) for array in feeds.values()))


def _tap(model: ModelProto) -> tuple[ModelProto, dict[str, str]]:
    """A copy whose fp16 and bf16 tensors are outputs too: from their names there to those in the graph, in its order.

    NumPy has no bf16, so these are fetched through a Cast.
    """
    import onnx
    from onnx import TensorProto, helper

    types = value_types(model)
    outputs = {value.name for value in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name not in outputs]
    low = {name: types[name] for name in made if types.get(name) in (TensorProto.FLOAT16, TensorProto.BFLOAT16)}
    if not low:
        return model, {}
    tapped, names = onnx.ModelProto(), {}
    tapped.CopyFrom(model)
    for name, kind in low.items():
        tap, fetched = name, kind
        if kind == TensorProto.BFLOAT16:
            tap, fetched = f"{name}_tapped", TensorProto.FLOAT
            tapped.graph.node.append(helper.make_node("Cast", [name], [tap], to=TensorProto.FLOAT))
        names[tap] = name
        tapped.graph.output.append(helper.make_tensor_value_info(tap, fetched, None))
    return tapped, names


def _overflow(model: ModelProto, tensor: str, seen_on: str) -> Overflow:
    made_by = next((node for node in model.graph.node if tensor in node.output), None)
    nodes = [made_by] if made_by is not None else []
    if made_by is not None and made_by.op_type == "Cast":  # put in by the conversion: its readers want the narrow type
        nodes = [node for node in model.graph.node if tensor in node.input]
    return Overflow(tensor, seen_on, layer_upstream(model, tensor), tuple(node.name for node in nodes))
