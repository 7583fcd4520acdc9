"""Checkpoints through PyTorch: the live or the baked network, eager or compiled. The only runtime file with torch."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gmconv.cli import require
from gmconv.errors import RefusedError, UnavailableError
from gmconv.foreign import NOTHING, Foreign
from gmconv.images import read_preprocessing
from runtime import cuda
from runtime.artefact import Artefact, Facts
from runtime.manifest import TensorSpec
from runtime.runners.base import Array, LayerTime, Query, Runner, validate_feeds
from runtime.runners.torch_queries import Captured, make_queries

if TYPE_CHECKING:
    import torch
    from torch import nn

Form = Literal["live", "baked"]
#: CUDA graphs kept, one for each shape run last: each holds the memory of its intermediate results.
GRAPHS = 8
log = logging.getLogger("gmconv.runners")


class TorchRunner(Runner):
    """A checkpoint's network in PyTorch.

    Args:
        path: `.pt`, `.pth` or `.safetensors`.
        device: "cpu", "cuda" or "cuda:N".
        form: "live" (masks computed in forward, as trained) or "baked" (plain convolutions).
        compiled: through `torch.compile`; the first run of each shape compiles.
        dtype: "float32", or "float64" for a yardstick: inputs stay float32 and are widened, outputs are float64.
        channels_last: memory format of weights and inputs.
        tf32: let CUDA use TF32 (off: strict fp32).
        cuda_graph: capture the run on the first call for each shape and replay it (the last `GRAPHS` shapes; where it
            cannot be captured that is said once, and it runs without).
        threads: of the CPU kernels (process-wide in PyTorch); PyTorch's choice when None.
        dynamic_hw: accept any height and width, not only the checkpoint's.
        input_name, output_names: to go by the names of an exported file.
        foreign: what a foreign checkpoint does not say of itself.

    `model` is the module in use, `checkpoint` what the file said.

    Raises:
        RefusedError, gmconv.errors.CheckpointError: the file is no checkpoint of a network we can build.
        UnavailableError: torch or the GPU is missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        form: Form = "live",
        compiled: bool = False,
        dtype: Literal["float32", "float64"] = "float32",
        channels_last: bool = False,
        tf32: bool = False,
        cuda_graph: bool = False,
        threads: int | None = None,
        dynamic_hw: bool = False,
        input_name: str = "input",
        output_names: Sequence[str] = (),
        foreign: Foreign = NOTHING,
    ) -> None:
        torch = require("torch", "export")
        gmconv = require("gmconv", "export")
        self._torch = torch
        self._device = _device(torch, device)
        self.device = str(self._device)
        if cuda_graph and self._device.type != "cuda":
            raise UnavailableError("a CUDA graph needs a GPU; leave cuda_graph out on the CPU")
        if threads:
            torch.set_num_threads(threads)
        self.checkpoint = gmconv.load_checkpoint(path, **foreign.given())
        found = self.checkpoint
        facts = Facts(found.input_shape, read_preprocessing(found.preprocessing), found.dataset, found.labels)
        self.artefact = Artefact(path=Path(path), kind="checkpoint", facts=facts, sha256=found.sha256)
        model: nn.Module = self.checkpoint.model
        if form == "baked":
            constants = require("gmconv.constants", "export")
            model, _ = constants.bake_for_inputs(model, self.checkpoint.inputs)
        self._dtype = getattr(torch, dtype)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        model = model.to(device=self._device, dtype=self._dtype).eval()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self._call: Callable[[Any], Any] = torch.compile(model) if compiled else model
        self._tf32, self._graph, self._output_names = tf32, cuda_graph, tuple(output_names)
        self._graphs: OrderedDict[tuple[int, ...], Captured] = OrderedDict()
        self._graph_problem: str | None = None
        channels, height, width = self.checkpoint.input_shape
        hw: tuple[int | str, ...] = ("height", "width") if dynamic_hw else (height, width)
        self.inputs = (TensorSpec(input_name, "float32", ("batch", channels, *hw)),)
        self.outputs = self._learn_outputs(dtype)
        words = [form, "compiled" if compiled else "eager", "CUDA graph" if cuda_graph else ""]
        words += [dtype if dtype != "float32" else "", "channels last" if channels_last else ""]
        self.name = f"torch {self._device.type}, " + ", ".join(word for word in words if word)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; float32 arrays in, arrays of the runner's dtype out."""
        validate_feeds(self.inputs, feeds)
        with self._mode(), self._words():
            outputs = self._forward(self._tensor(feeds))
        return {name: value.numpy(force=True).copy() for name, value in self._named(outputs).items()}

    def bind(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """A call that runs on inputs already on the device, and waits for the GPU where there is one."""
        self.run(feeds)  # compiles, captures and allocates; what cannot run fails here
        tensor, call, inference = self._tensor(feeds), self._call, self._torch.inference_mode
        if self._device.type == "cpu":

            def bound() -> object:
                with inference():
                    return call(tensor)

            return bound
        synchronize, device = self._torch.cuda.synchronize, self._device
        with self._mode():
            captured = self.capture(tensor) if self._graph else None
        if captured is not None:
            call, tensor = captured, captured.input

        def bound_on_gpu() -> object:
            with self._mode():
                result = call(tensor)
            synchronize(device)
            return result

        return bound_on_gpu

    def queries(
        self,
        feeds: Mapping[str, Array],
        count: int,
        *,
        transfers: bool,
        cuda_graph: bool,
        streams: int = 1,
        spin: bool = True,
    ) -> list[Query] | None:
        """On a GPU, queries clocked by CUDA events; None on the CPU."""
        if self._device.type != "cuda":
            return None
        validate_feeds(self.inputs, feeds)
        with self._words():
            host = self._torch.from_numpy(feeds[self.inputs[0].name]).pin_memory()
            return [*make_queries(self, host, count, streams, transfers=transfers, graph=cuda_graph, spin=spin)]

    @property
    def graph_problem(self) -> str | None:
        """Why CUDA graphs do not work here, once that has shown."""
        return self._graph_problem

    def capture(self, tensor: torch.Tensor) -> Captured | None:
        """A CUDA graph of the run on inputs like `tensor`, inside `_mode`; None where there can be none."""
        if self._graph_problem is None:
            try:
                return Captured(self._torch, self._call, tensor)
            except self._torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._graph_problem = " ".join(str(error).split())[:200]
                log.warning("%s: no CUDA graph (%s); run without", self.name, self._graph_problem)
        return None

    def activations(self, feeds: Mapping[str, Array]) -> dict[str, list[Array]]:
        """What each module returned in one run, call by call, in the order in which they returned first.

        Modules that return something other than one tensor are left out. The arrays are copies: an in-place operation
        further on does not change them.
        """
        validate_feeds(self.inputs, feeds)
        found: dict[str, list[Array]] = {}

        def hook(name: str) -> Callable[[Any, Any, Any], None]:
            def keep(module: Any, given: Any, output: Any) -> None:
                if isinstance(output, self._torch.Tensor):
                    found.setdefault(name, []).append(output.numpy(force=True).copy())

            return keep

        handles = [module.register_forward_hook(hook(name)) for name, module in self.model.named_modules() if name]
        try:
            with self._mode(), self._words():
                self.model(self._tensor(feeds))
        finally:
            for handle in handles:
                handle.remove()
        return found

    def sigmas(self) -> dict[str, str]:
        """Each masked layer's sigma in words: a number, or the range over its channels."""
        found = {}
        for name, module in self.model.named_modules():
            sigma = getattr(module, "sigma", None)
            if isinstance(sigma, self._torch.Tensor):
                low, high = float(sigma.detach().min()), float(sigma.detach().max())
                found[name] = f"{low:.3f}" if low == high else f"{low:.3f}..{high:.3f}"
        return found

    def batch_norms(self) -> set[str]:
        """Names of the BatchNorm layers."""
        kind = self._torch.nn.modules.batchnorm._BatchNorm
        return {name for name, module in self.model.named_modules() if isinstance(module, kind)}

    def weighted_modules(self) -> set[str]:
        """Names of the convolutions and linear layers, also of those that a user wrote: parameters, and no norm."""
        nn = self._torch.nn
        layers = (nn.modules.conv._ConvNd, nn.Linear)
        others = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)

        def weighted(name: str, module: Any) -> bool:
            own = any(parameter is not None for parameter in module._parameters.values())
            return own and not isinstance(module, others) and "parametrizations" not in name.split(".")

        return {n for n, m in self.model.named_modules() if isinstance(m, layers) or weighted(n, m)}

    def layer_times(self, feeds: Mapping[str, Array], runs: int) -> list[LayerTime] | None:
        """Time of each leaf module over `runs` eager runs, by hooks; None for a compiled network, which has none."""
        if self._call is not self.model:
            return None
        from runtime.runners.torch_layers import module_times

        return module_times(self, feeds, runs)

    def layer_info(self) -> dict[str, Any] | None:
        """The leaf modules, with their class and what they print of themselves."""
        leaves = [(name, m) for name, m in self.model.named_modules() if name and not any(m.children())]
        return {"Layers": [{"Name": n, "LayerType": type(m).__name__, "Settings": m.extra_repr()} for n, m in leaves]}

    def close(self) -> None:
        """Drop the network and its graphs."""
        self._graphs.clear()

    def _learn_outputs(self, dtype: str) -> tuple[TensorSpec, ...]:
        """Output names and shapes, from one run at batch 2."""
        torch = self._torch
        channels, height, width = self.checkpoint.input_shape
        with torch.inference_mode(), self._words():
            example = torch.zeros((2, channels, height, width), dtype=self._dtype, device=self._device)
            named = self._named(self.model(example))
        free = self.inputs[0].shape[2:] != (height, width)
        return tuple(
            TensorSpec(
                name,
                dtype if value.is_floating_point() else str(value.dtype).removeprefix("torch."),
                tuple(
                    "batch" if axis == 0 and n == 2 else f"{name}_{axis}" if free and axis > 1 else n
                    for axis, n in enumerate(value.shape)
                ),
            )
            for name, value in named.items()
        )

    def _tensor(self, feeds: Mapping[str, Array]) -> torch.Tensor:
        import numpy as np

        tensor = self._torch.from_numpy(np.ascontiguousarray(feeds[self.inputs[0].name]))
        found: torch.Tensor = tensor.to(device=self._device, dtype=self._dtype, memory_format=self._format)
        return found

    def _forward(self, tensor: torch.Tensor) -> Any:
        key = tuple(tensor.shape)
        captured = self._graphs.pop(key, None) or (self.capture(tensor) if self._graph else None)
        if captured is None:
            return self._call(tensor)
        self._graphs[key] = captured  # the newest use last
        if len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        return captured(tensor)

    def _named(self, outputs: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = require("gmconv.outputs", "export").named_outputs(outputs, self._output_names)
        return found

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """Inference mode on this runner's device, with TF32 as asked for and not as other code left it."""
        torch = self._torch
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self._tf32
        try:
            with torch.inference_mode(), torch.cuda.device(self._device) if self.device != "cpu" else nullcontext():
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

    @contextlib.contextmanager
    def _words(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, TypeError) as error:
            text = " ".join(str(error).split())[:300]
            if isinstance(error, self._torch.OutOfMemoryError):
                raise cuda.DeviceMemoryError(
                    f"{self.device}: {text.partition('. ')[0]}; use a smaller batch"
                ) from error
            if text.startswith("CUDA error"):
                raise cuda.CudaError(f"{self.device}: {text.partition(' CUDA kernel errors')[0]}") from error
            if "compile" in type(error).__module__ or "inductor" in type(error).__module__ or "dynamo" in text:
                raise UnavailableError(f"torch.compile does not work on this machine: {text}") from error
            raise RefusedError(f"the checkpoint's network does not run on this input: {text}") from error


def write_twin(checkpoint: Path, output: Path, foreign: Foreign = NOTHING) -> None:
    """Write the plain-convolution twin: the checkpoint with every sigma so large that its mask is exactly 1.

    Baked or exported, it is the network of the same topology and the same trained weights that never had a mask.
    Raises gmconv.errors.CheckpointError.
    """
    gmconv = require("gmconv", "export")
    found = gmconv.load_checkpoint(checkpoint, **foreign.given())
    gmconv.save_checkpoint(
        output,
        require("gmconv.erf", "export").without_masks(found.model),
        found.arch,
        found.input_shape,
        found.arch_kwargs,
        preprocessing=found.preprocessing,
        labels=found.labels,
        dataset=found.dataset,
    )


def receptive_fields(checkpoint: Path, samples: int = 32, foreign: Foreign = NOTHING) -> tuple[Array, Array]:
    """Effective receptive field without and with the masks, each (H, W) float64; see `gmconv.erf`."""
    gmconv = require("gmconv", "export")
    found = gmconv.load_checkpoint(checkpoint, **foreign.given())
    fields = require("gmconv.erf", "export").receptive_fields(found.model, found.input_shape, samples)
    return fields.before.numpy(), fields.after.numpy()


def _device(torch: Any, device: str) -> torch.device:
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "gpu") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise UnavailableError(f"device {device!r} is unknown; cpu, cuda or cuda:N")
    if kind != "cpu":
        if not torch.cuda.is_available():
            raise UnavailableError(
                f"torch {torch.__version__} finds no GPU: it needs a CUDA build and an NVIDIA driver; use --device cpu"
            )
        if int(index or 0) >= torch.cuda.device_count():
            raise UnavailableError(f"torch finds {torch.cuda.device_count()} GPUs; {device!r} was asked for")
        return torch.device("cuda", int(index or 0))  # type: ignore[no-any-return]
    return torch.device("cpu")  # type: ignore[no-any-return]
