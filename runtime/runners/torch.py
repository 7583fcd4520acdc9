"""Checkpoints through PyTorch: the live or the baked network, eager or compiled. The only runtime file with torch."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from gmconv.cli import require
from gmconv.errors import ArchitectureUnsaidError, InputsUnsaidError, RefusedError, UnavailableError
from gmconv.foreign import NOTHING, Foreign, refuse_labels
from gmconv.preprocessing import read_preprocessing
from runtime import cuda
from runtime.artefact import Artefact, Facts, exported_as
from runtime.manifest import TensorSpec
from runtime.records import CropLayer
from runtime.runners.base import Array, LayerTime, Query, Runner, Threads, validate_feeds
from runtime.runners.torch_network import Captured, torch_device
from runtime.runners.torch_queries import make_queries

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gmconv.checkpoint import Checkpoint
    from gmconv.inputs import Input
    from gmconv.rounding import Rounding

Form = Literal["live", "baked"]
#: CUDA graphs kept, one for each shape run last: each holds the memory of its intermediate results.
GRAPHS = 8
log = logging.getLogger("gmconv.runners")


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchOptions:
    """How to run a checkpoint.

    Args:
        form: "live" (masks computed in forward, as trained) or "baked" (plain convolutions).
        compiled: through `torch.compile`; the first run of each shape compiles.
        dtype: "float32", or "float64" for a yardstick: inputs stay as they are and are widened, outputs are float64.
        channels_last: memory format of weights and images.
        tf32: let CUDA use TF32 (off: strict fp32).
        cuda_graph: capture the run on the first call for each shape and replay it (the last `GRAPHS` shapes; where it
            cannot be captured that is said once, and it runs without).
        threads: of the CPU kernels (process-wide in PyTorch); PyTorch's choice when None.
        dynamic_hw: accept any height and width of images, not only the checkpoint's.
        foreign: what a foreign checkpoint does not say of itself.
    """

    form: Form = "live"
    compiled: bool = False
    dtype: Literal["float32", "float64"] = "float32"
    channels_last: bool = False
    tf32: bool = False
    cuda_graph: bool = False
    threads: Threads | None = None
    dynamic_hw: bool = False
    foreign: Foreign = NOTHING


class TorchRunner(Runner):
    """A checkpoint's network in PyTorch.

    Args:
        path: `.pt`, `.pth` or `.safetensors`.
        device: "cpu", "cuda" or "cuda:N".
        options: see `TorchOptions`.

    `model` is the module in use, `call` that or its compiled form, `checkpoint` what the file said.

    Raises:
        RefusedError, gmconv.errors.CheckpointError: the file is no checkpoint of a network we can build.
        UnavailableError: torch or the GPU is missing.
    """

    Options = TorchOptions

    def __init__(self, path: Path, device: str = "cpu", options: TorchOptions = TorchOptions()) -> None:
        self.torch = torch = require("torch", "export")
        self.place = torch_device(torch, device)
        self.device = str(self.place)
        if options.cuda_graph and self.place.type != "cuda":
            raise UnavailableError("a CUDA graph needs a GPU; leave cuda_graph out on the CPU")
        if options.threads:
            torch.set_num_threads(options.threads)
        self.checkpoint = found = load(path, options.foreign)
        shape, preprocessing = found.input_shape, read_preprocessing(found.preprocessing)
        sizes = {given.name: given.shape for given in found.inputs}
        facts = Facts(shape, preprocessing, found.dataset, found.labels, shapes=sizes)
        self.artefact = Artefact(
            path=Path(path), kind="checkpoint", facts=facts, sha256=found.sha256, assumed=found.warnings
        )
        model: nn.Module = found.model
        if options.form == "baked":
            model, _ = require("gmconv.constants", "export").bake_for_inputs(model, found.inputs)
        self._dtype = getattr(torch, options.dtype)
        self._format = torch.channels_last if options.channels_last else torch.contiguous_format
        model = model.to(device=self.place, dtype=self._dtype)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self.call: Callable[..., Any] = torch.compile(model) if options.compiled else model
        self._options = options
        self._graphs: OrderedDict[tuple[Any, ...], Captured] = OrderedDict()
        self._graph_problem: str | None = None
        self.inputs = tuple(
            TensorSpec(given.name, given.dtype, ("batch", *self._sides(given, alone=len(found.inputs) == 1)))
            for given in found.inputs
        )
        self.outputs = self._learn_outputs()
        refuse_labels(found.labels, [spec.shape for spec in self.outputs], options.foreign)
        words = [options.form, "compiled" if options.compiled else "eager"]
        words += ["CUDA graph"] * options.cuda_graph + [options.dtype] * (options.dtype != "float32")
        words += ["channels last"] * options.channels_last
        self.name = f"torch {self.place.type}, {', '.join(words)}"

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; float32 arrays in, arrays of the runner's dtype out."""
        validate_feeds(self.inputs, feeds)
        with self.mode(), self._words():
            outputs = self._forward(self.tensors(feeds))
        return {name: value.numpy(force=True).copy() for name, value in self.named(outputs).items()}

    def bind(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """A call that runs on inputs already on the device, and waits for the GPU where there is one."""
        self.run(feeds)  # compiles, captures and allocates; what cannot run fails here
        tensors, call, inference = self.tensors(feeds), self.call, self.torch.inference_mode
        if self.place.type == "cpu":

            def bound() -> object:
                with inference():
                    return call(*tensors)

            return bound
        synchronize, place = self.torch.cuda.synchronize, self.place
        with self.mode():
            captured = self.capture(tensors) if self._options.cuda_graph else None
        if captured is not None:
            call, tensors = captured, captured.inputs

        def bound_on_gpu() -> object:
            with self.mode():
                result = call(*tensors)
            synchronize(place)
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
        if self.place.type != "cuda":
            return None
        validate_feeds(self.inputs, feeds)
        with self._words():
            host = tuple(self.torch.from_numpy(feeds[spec.name]).pin_memory() for spec in self.inputs)
            return [*make_queries(self, host, count, streams, transfers=transfers, graph=cuda_graph, spin=spin)]

    @property
    def graph_problem(self) -> str | None:
        """Why CUDA graphs do not work here, once that has shown."""
        return self._graph_problem

    def capture(self, tensors: tuple[torch.Tensor, ...]) -> Captured | None:
        """A CUDA graph of the run on inputs like `tensors`, inside `mode`; None where there can be none."""
        if self._graph_problem is None:
            try:
                return Captured(self.torch, self.call, tensors)
            except self.torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._graph_problem = " ".join(str(error).split())[:200]
                log.warning("%s: no CUDA graph (%s); run without", self.name, self._graph_problem)
        return None

    def table_ends(self) -> dict[str, tuple[int, int]]:
        """See `gmconv.lookups`."""
        return require("gmconv.lookups", "export").table_ends(self.model, self.checkpoint.inputs)  # type: ignore[no-any-return]

    def activations(self, feeds: Mapping[str, Array]) -> dict[str, list[Array]]:
        """What each module returned in one run, call by call, in the order in which they returned first.

        Modules that return something other than one tensor are left out. The arrays are copies: an in-place operation
        further on does not change them.
        """
        validate_feeds(self.inputs, feeds)
        found: dict[str, list[Array]] = {}

        def hook(name: str) -> Callable[[Any, Any, Any], None]:
            def keep(module: Any, given: Any, output: Any) -> None:
                if isinstance(output, self.torch.Tensor):
                    found.setdefault(name, []).append(output.numpy(force=True).copy())

            return keep

        handles = [module.register_forward_hook(hook(name)) for name, module in self.model.named_modules() if name]
        try:
            with self.mode(), self._words():
                self.model(*self.tensors(feeds))
        finally:
            for handle in handles:
                handle.remove()
        return found

    def sigmas(self) -> dict[str, str]:
        """Each masked layer's sigma in words: a number, or the range over its channels."""
        found = {}
        for name, module in self.model.named_modules():
            sigma = getattr(module, "sigma", None)
            if isinstance(sigma, self.torch.Tensor):
                low, high = float(sigma.detach().min()), float(sigma.detach().max())
                found[name] = f"{low:.3f}" if low == high else f"{low:.3f}..{high:.3f}"
        return found

    def batch_norms(self) -> set[str]:
        """Names of the BatchNorm layers."""
        kind = self.torch.nn.modules.batchnorm._BatchNorm
        return {name for name, module in self.model.named_modules() if isinstance(module, kind)}

    def weighted_modules(self) -> set[str]:
        """Names of the convolutions and linear layers, also of those that a user wrote: parameters, and no norm."""
        from runtime.runners.torch_layers import weighted_modules

        return weighted_modules(self)

    def layer_times(self, feeds: Mapping[str, Array], runs: int) -> list[LayerTime] | None:
        """Time of each leaf module over `runs` eager runs, by hooks; None for a compiled network, which has none."""
        if self.call is not self.model:
            return None
        from runtime.runners.torch_layers import module_times

        return module_times(self, feeds, runs)

    def layer_info(self) -> dict[str, Any] | None:
        """The leaf modules, with their class and what they print of themselves."""
        leaves = [(name, m) for name, m in self.model.named_modules() if name and not any(m.children())]
        return {"Layers": [{"Name": n, "LayerType": type(m).__name__, "Settings": m.extra_repr()} for n, m in leaves]}

    def crop(self, layers: Iterable[CropLayer]) -> dict[str, float]:
        """Cut the baked network as a manifest says: see `gmconv.cropping.choose.crop_alike`."""
        cut = [(layer.name, layer.kernel, layer.offset, layer.kept) for layer in layers if layer.kept != layer.kernel]
        return require("gmconv.cropping.choose", "export").crop_alike(self.model, cut)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Drop the network and its graphs."""
        self._graphs.clear()

    def _sides(self, given: Input, *, alone: bool) -> tuple[int | str, ...]:
        """The shape of one sample of an input, height and width by name where they are free."""
        if not (self._options.dynamic_hw and given.is_image):
            return given.shape
        return (given.shape[0], *(side if alone else f"{given.name}_{side}" for side in ("height", "width")))

    def _learn_outputs(self) -> tuple[TensorSpec, ...]:
        """Output names and shapes, from one run at batch 2. Raises RefusedError for one in bfloat16."""
        feeds = require("gmconv.inputs", "export").noise(self.checkpoint.inputs, 2)
        with require("gmconv.checkpoint.unsaved", "export").saved_alone(self.model), self.mode(), self._words():
            named = self.named(self.model(*self.tensors(feeds)))
        require("gmconv.outputs", "export").refuse_unshippable(named)
        free = any(isinstance(side, str) for spec in self.inputs for side in spec.shape[1:])
        return tuple(
            TensorSpec(
                name,
                self._options.dtype if value.is_floating_point() else str(value.dtype).removeprefix("torch."),
                tuple(
                    "batch" if axis == 0 and n == 2 else f"{name}_{axis}" if free and axis > 1 else n
                    for axis, n in enumerate(value.shape)
                ),
            )
            for name, value in named.items()
        )

    def tensors(self, feeds: Mapping[str, Array]) -> tuple[torch.Tensor, ...]:
        """Arrays as arguments of the forward, on the device, those of floating point in the network's dtype."""
        import numpy as np

        found = []
        for spec in self.inputs:
            tensor = self.torch.from_numpy(np.ascontiguousarray(feeds[spec.name]))
            dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
            layout = self._format if tensor.ndim == 4 else self.torch.contiguous_format
            found.append(tensor.to(device=self.place, dtype=dtype, memory_format=layout))
        return tuple(found)

    def _forward(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        key = tuple(tuple(tensor.shape) for tensor in tensors)
        captured = self._graphs.pop(key, None) or (self.capture(tensors) if self._options.cuda_graph else None)
        if captured is None:
            return self.call(*tensors)
        self._graphs[key] = captured  # the newest use last
        if len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        return captured(*tensors)

    def named(self, outputs: Any) -> dict[str, torch.Tensor]:
        """What the network returned, by name (see `gmconv.outputs.named_outputs`)."""
        found: dict[str, torch.Tensor] = require("gmconv.outputs", "export").named_outputs(outputs)
        return found

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """Inference mode on this runner's device, with TF32 as asked for and not as other code left it.

        In float64 what the forward itself makes in float32 is widened too.
        """
        torch = self.torch
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self._options.tf32
        try:
            wide = require("gmconv.double", "export").widening if self._options.dtype == "float64" else nullcontext
            with (
                torch.inference_mode(),
                torch.cuda.device(self.place) if self.device != "cpu" else nullcontext(),
                wide(),
            ):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

    @contextlib.contextmanager
    def _words(self) -> Iterator[None]:
        try:
            yield
        except (click.ClickException, MemoryError):
            raise
        except Exception as error:  # a forward is somebody's own code
            text = " ".join(str(error).split())[:300]
            if isinstance(error, self.torch.OutOfMemoryError):
                raise cuda.DeviceMemoryError(
                    f"{self.device}: {text.partition('. ')[0]}; use a smaller batch"
                ) from error
            if text.startswith("CUDA error"):
                raise cuda.CudaError(f"{self.device}: {text.partition(' CUDA kernel errors')[0]}") from error
            if "compile" in type(error).__module__ or "inductor" in type(error).__module__ or "dynamo" in text:
                raise UnavailableError(f"torch.compile does not work on this machine: {text}") from error
            raise RefusedError(f"{self.artefact.path}: its network does not run on this input: {text}") from error


def load(checkpoint: Path, foreign: Foreign) -> Checkpoint:
    """`gmconv.load_checkpoint`, with the inputs that other files of the network have, where nothing else says them."""
    gmconv = require("gmconv", "export")
    try:
        return gmconv.load_checkpoint(checkpoint, **foreign.given())  # type: ignore[no-any-return]
    except (ArchitectureUnsaidError, InputsUnsaidError) as error:
        if foreign.usual_inputs and not foreign.inputs:
            return load(checkpoint, replace(foreign, inputs=foreign.usual_inputs))
        raise type(error)(error.message + exported_as(Path(checkpoint), foreign.beside)) from None


def rounding(precision: str, **options: Any) -> Rounding:
    """What torch computes meanwhile rounds as in `precision`; see `gmconv.rounding.Rounding`."""
    found: Rounding = require("gmconv.rounding", "export").Rounding(precision, **options)
    return found


def write_twin(checkpoint: Path, output: Path, foreign: Foreign = NOTHING) -> None:
    """Write the plain-convolution twin: the checkpoint with every sigma so large that its mask is exactly 1.

    Baked or exported, it is the network of the same topology that never had a mask; see `gmconv.erf.plain_twin`.
    Raises gmconv.errors.CheckpointError.
    """
    gmconv = require("gmconv", "export")
    found = load(checkpoint, foreign)
    gmconv.save_checkpoint(
        output,
        require("gmconv.erf", "export").plain_twin(found.model),
        found.arch,
        found.input_shape,
        found.arch_kwargs,
        preprocessing=found.preprocessing,
        labels=found.labels,
        dataset=found.dataset,
        inputs=[(given.name, given.shape, given.dtype) for given in found.inputs],
    )


def receptive_fields(checkpoint: Path, samples: int = 32, foreign: Foreign = NOTHING) -> tuple[Array, Array]:
    """Effective receptive field without and with the masks, each (H, W) float64; see `gmconv.erf`."""
    found = load(checkpoint, foreign)
    if len(found.inputs) != 1 or found.input_shape is None:
        raise RefusedError(f"{checkpoint}: takes something else than one image")
    fields = require("gmconv.erf", "export").receptive_fields(found.model, found.input_shape, samples)
    return fields.before.numpy(), fields.after.numpy()
