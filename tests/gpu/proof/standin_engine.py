"""An engine without TensorRT: what the TensorRT runner asks of TensorRT's API, answered by a kernel of our own.

On a card the kernel is CUDA C++ compiled by NVRTC and launched through cuda-bindings, so streams, copies, captures,
events and buffers are proven where no TensorRT is installed. In a rehearsal the double of the driver computes it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from runtime import trt
from runtime.manifest import TensorSpec
from runtime.runners.base import numpy_dtype
from tests.gpu.proof.rows import require

Shapes = Mapping[str, tuple[int, ...]]
VERSION = "10.13.0.0"


class Kernel(Protocol):
    """Enqueue the computation on the stream `handle`: device addresses and shapes by tensor name."""

    def __call__(self, handle: int, addresses: Mapping[str, int], shapes: Shapes) -> None: ...


class TensorIOMode(Enum):
    """As TensorRT's."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2


class LayerInformationFormat(Enum):
    """As TensorRT's."""

    ONELINE = 0
    JSON = 1


class Base:
    """A class of TensorRT's that ours derive from."""

    def __init__(self) -> None: ...


class Context:
    """An execution context. As TensorRT's it refuses by raising, and executes on whatever addresses are set then."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = -1
        self.profiler: Any = None

    def set_optimization_profile_async(self, index: int, handle: int) -> bool:
        if not 0 <= index < self._engine.num_optimization_profiles:
            raise RuntimeError(f"profile {index} of {self._engine.num_optimization_profiles}")
        self._profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if not all(a <= d <= b for a, d, b in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [spec.name for spec in self._engine.inputs if spec.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        batch = next(iter(self._shapes.values()))[0]
        spec = next(spec for spec in self._engine.outputs if spec.name == name)
        return tuple(d if isinstance(d, int) else batch for d in spec.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return bool(address)

    def execute_async_v3(self, handle: int) -> bool:
        shapes = {spec.name: self.get_tensor_shape(spec.name) for spec in (*self._engine.inputs, *self._engine.outputs)}
        self._engine.kernel(handle, dict(self._addresses), shapes)
        if self.profiler is not None:
            self.profiler.report_layer_time("the kernel", 0.001)
        return True


class Engine:
    """An engine of these tensors, with these batch profiles."""

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        profiles: list[tuple[int, int, int]],
        kernel: Kernel,
    ) -> None:
        self.inputs, self.outputs, self.kernel = inputs, outputs, kernel
        self._profiles = profiles
        self._specs = {spec.name: spec for spec in (*inputs, *outputs)}
        self.num_io_tensors = len(self._specs)
        self.num_optimization_profiles = len(profiles)
        self.device_memory_size_v2 = 0

    def get_tensor_name(self, index: int) -> str:
        return list(self._specs)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in {spec.name for spec in self.inputs} else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        names = {ours: theirs for theirs, ours in trt.DTYPES.items()}
        return SimpleNamespace(name=names[self._specs[name].dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self._specs[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        rest = self.get_tensor_shape(name)[1:]
        return [(batch, *rest) for batch in self._profiles[index]]

    def create_execution_context(self, config: Any = None) -> Context:
        return Context(self)

    def create_engine_inspector(self) -> SimpleNamespace:
        return SimpleNamespace(get_engine_information=lambda form: '{"Layers": [{"Name": "the kernel"}]}')

    def create_runtime_config(self) -> SimpleNamespace:
        cache = SimpleNamespace(serialize=lambda: b"", deserialize=lambda data: True)
        return SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda cache: True)


@contextmanager
def in_place_of_tensorrt(make: Callable[[bytes], Engine], version: str = VERSION) -> Iterator[None]:
    """Let `trt.api` answer with the stand-in, whichever flavor is asked for; `make` gets the bytes of the plan."""

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, plan: bytes) -> Engine:
            return make(bytes(plan))

        def get_engine_validity(self, plan: bytes) -> tuple[Any, int]:
            return EngineValidity.VALID, 0

    class EngineValidity(Enum):
        VALID = 0
        SUBOPTIMAL = 1
        INVALID = 2

    strategy = SimpleNamespace(
        EAGER="eager", LAZY="lazy", NONE="none", DISABLED="disabled", WHOLE_GRAPH_CAPTURE="whole graph"
    )
    api = SimpleNamespace(
        __version__=version,
        ILogger=Base,
        IProfiler=Base,
        Runtime=Runtime,
        EngineValidity=EngineValidity,
        TensorIOMode=TensorIOMode,
        LayerInformationFormat=LayerInformationFormat,
        DynamicShapesKernelSpecializationStrategy=strategy,
        CudaGraphStrategy=strategy,
    )
    with mock.patch.object(trt, "api", return_value=api):
        yield


SOURCE = """
extern "C" __global__ void stand_in(const float* x, float* y, int n, int rounds) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    for (int k = 0; k < rounds; ++k) v = 0.5f * v + 1.0f;
    y[i] = v;
}
"""
ROUNDS = 16


def expected(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the kernel computes, bit for bit: halving is exact, so a fused multiply-add rounds as often as two steps."""
    values = images.copy()
    for _ in range(ROUNDS):
        values = np.float32(0.5) * values + np.float32(1.0)
    return values


class CompiledKernel:
    """`SOURCE` as machine code for the card, launched through cuda-bindings, with either driver behind the streams.

    `code` None: compiled by NVRTC. The context must be current when it is made.
    """

    def __init__(self, compute_capability: str, code: bytes | None = None) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._module = _take(driver.cuModuleLoadData(code or compile_kernel(compute_capability)))
        self._function = _take(driver.cuModuleGetFunction(self._module, b"stand_in"))

    def __call__(self, handle: int, addresses: Mapping[str, int], shapes: Shapes) -> None:
        count = math.prod(shapes["logits"])
        values = (addresses["input"], addresses["logits"], count, ROUNDS)
        types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
        blocks = (count + 255) // 256
        stream = self._driver.CUstream(handle)
        _take(self._driver.cuLaunchKernel(self._function, blocks, 1, 1, 256, 1, 1, 0, stream, (values, types), 0))


def compile_kernel(compute_capability: str) -> bytes:
    """`SOURCE` as a cubin. Not PTX: that of a newer NVRTC is refused by an older driver."""
    from cuda.bindings import nvrtc

    program = _take(nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"stand_in.cu", 0, [], []))
    option = f"--gpu-architecture=sm_{compute_capability.replace('.', '')}".encode()
    (status,) = nvrtc.nvrtcCompileProgram(program, 1, [option])
    log = b" " * _take(nvrtc.nvrtcGetProgramLogSize(program))
    _take(nvrtc.nvrtcGetProgramLog(program, log))
    require(not int(status), f"NVRTC: {log.decode(errors='replace').strip()}")
    code = b" " * _take(nvrtc.nvrtcGetCUBINSize(program))
    _take(nvrtc.nvrtcGetCUBIN(program, code))
    return code


def _take(answer: tuple[Any, ...]) -> Any:
    status, *rest = answer
    require(not int(status), f"{status!r}")
    return rest[0] if rest else None


def on_host_memory(address: int, spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
    """A tensor in the double's device memory, which is the host's."""
    dtype = numpy_dtype(spec.dtype)
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8).view(dtype).reshape(shape)
