"""What takes a card's place in a rehearsal: the double of the driver, and ONNX Runtime inside TensorRT's engines."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from runtime import trt
from runtime.manifest import read_manifest
from runtime.runners.base import numpy_dtype
from tests.gpu.proof import standin_engine
from tests.runtime.cuda.double import Double, build


@contextlib.contextmanager
def driver_double(work: Path) -> Iterator[None]:
    """Load the double in this process before anything asks for libcuda.so.1: whoever does then gets this one."""
    folder = work / "double"
    folder.mkdir(exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        build(folder)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    yield


@contextlib.contextmanager
def engines_on_onnxruntime(source: Path) -> Iterator[None]:
    """Whatever plan is opened computes what the ONNX file `source` does, in the double's memory."""
    import onnxruntime

    manifest = read_manifest(source)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    double = Double()
    specs = {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs)}
    names = [spec.name for spec in manifest.outputs]

    def kernel(handle: int, addresses: Mapping[str, int], shapes: standin_engine.Shapes) -> None:
        def compute() -> None:
            arrays = {name: standin_engine.on_host_memory(addresses[name], specs[name], shapes[name]) for name in specs}
            feeds = {spec.name: np.array(arrays[spec.name], numpy_dtype(spec.dtype)) for spec in manifest.inputs}
            for name, found in zip(names, session.run(names, feeds), strict=True):
                arrays[name][...] = found

        double.kernel(compute, handle)

    def make(plan: bytes) -> standin_engine.Engine:
        return standin_engine.Engine(manifest.inputs, manifest.outputs, [(1, 8, 32)], kernel)

    with standin_engine.in_place_of_tensorrt(make, trt.version(trt.api("rtx"))):
        yield
