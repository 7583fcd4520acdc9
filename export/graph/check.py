"""The last look at a converted graph before it gets its name, and the writing of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.graph.read import layer_upstream, value_types
from gmconv.errors import RefusedError
from runtime.runners.base import numpy_dtype
from runtime.runners.qdq import graph_options

if TYPE_CHECKING:
    from onnx import ModelProto

    from runtime.manifest import Manifest, TensorSpec

_EXTERNAL_ABOVE = 2**31 - 2**20


def image_shape(model: ModelProto) -> tuple[int | None, tuple[int, int, int]]:
    """Batch (None: dynamic) and (C, H, W) of the graph's only image input.

    Raises RefusedError when the graph has several inputs or no (N, C, H, W) input with known C, H and W.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise RefusedError(f"the graph has {len(inputs)} inputs; calibration knows networks with one image input")
    dims = [d.dim_value if d.HasField("dim_value") else None for d in inputs[0].type.tensor_type.shape.dim]
    if len(dims) != 4 or not all(dims[1:]):
        raise RefusedError(
            f"input {inputs[0].name!r} has shape {dims}; calibration needs (N, C, H, W) with fixed C, H and W"
        )
    return dims[0], (dims[1] or 0, dims[2] or 0, dims[3] or 0)


def check_and_run(model: ModelProto, precision: str) -> None:
    """Run onnx.checker in full, open the graph in ONNX Runtime on the CPU and run it once on noise.

    Raises RefusedError when an op has no kernel in this precision, or a tensor is NaN or infinite (the layer where it
    begins is named).
    """
    import onnx

    if model.ByteSize() < _EXTERNAL_ABOVE:
        onnx.checker.check_model(model, full_check=True)
    # ONNX Runtime computes fp16 ops in fp32 on the CPU and drops the rounding between two of them, and with it an
    # overflow that a GPU would have: fetching every fp16 tensor makes it round.
    tapped, names = _tap_fp16(model)
    session = _open(tapped, precision)
    feeds = {value.name: _noise(value) for value in session.get_inputs()}
    outputs = [value.name for value in model.graph.output]
    for name, array in zip([*names, *outputs], session.run([*names, *outputs], feeds), strict=True):
        if not np.isfinite(array.astype(np.float32)).all():
            layer = layer_upstream(model, name)
            raise RefusedError(
                f"{precision}: layer {layer!r} overflows on unit noise (tensor {name!r} is NaN or infinite); "
                f"--keep-fp32 {layer} keeps it in fp32"
            )


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
    """Write `output`, its external data where asked (or needed: 2 GiB) and its manifest, all or nothing."""
    import onnx
    import onnxruntime

    from gmconv.files import staged
    from runtime.manifest import digest_onnx, sidecar, utc_now

    external = external or model.ByteSize() >= _EXTERNAL_ABOVE
    with staged(output) as folder:
        file = folder / output.name
        if external:
            onnx.save(model, file, save_as_external_data=True, location=f"{file.name}.data", size_threshold=1024)
        else:
            onnx.save(model, file)
        versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
        artefact, *data = digest_onnx(file)
        manifest = replace(
            manifest,
            artefact=artefact,
            external=tuple(data),
            created=utc_now(),
            versions=manifest.versions | versions,
        )
        sidecar(file).write_text(manifest.to_json())
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
        raise RefusedError(f"ONNX Runtime refuses the {precision} graph: {str(error).splitlines()[0]}") from error


def _noise(value: Any) -> Any:
    types = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}
    dtype = numpy_dtype(types[value.type])
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def _tap_fp16(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """A copy whose fp16 tensors are outputs too, and their names in graph order."""
    import onnx
    from onnx import TensorProto, helper

    types = value_types(model)
    made = [name for node in model.graph.node for name in node.output]
    outputs = {value.name for value in model.graph.output}
    names = [name for name in made if types.get(name) == TensorProto.FLOAT16 and name not in outputs]
    if not names:
        return model, []
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    tapped.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names)
    return tapped, names
