"""What is exported: a checkpoint on disk, whose reference runs in a process of its own, or a network in memory."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from export.onnx.options import ExportOptions, Note
from export.onnx.refusals import require_libraries
from gmconv.errors import BakeError, RefusedError, SurgeryError
from gmconv.foreign import Foreign, preprocessing_of, sizing
from runtime.manifest import FileDigest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from export.onnx.reference import Reference, Work
    from runtime.runners.base import Array


@dataclass(frozen=True, slots=True)
class Live:
    """A network in memory, as the user's own program has it, and examples of its inputs (see `gmconv.deploy`)."""

    model: nn.Module
    examples: Any
    foreign: Foreign


class FromFile:
    """A checkpoint. Its live network runs in a process that never sees the exporter."""

    examples: Mapping[str, Array] | None = None

    def __init__(self, path: Path, options: ExportOptions, note: Note) -> None:
        from export.onnx.process import ReferenceProcess

        self._path, self._given = path, options.foreign.given()
        self._stack = contextlib.ExitStack()
        self._process = self._stack.enter_context(ReferenceProcess())  # it loads torch while we do
        self._later: Work | None = None
        try:
            require_libraries(options)
            note(f"loading {path}")
            from runtime.runners.torch import load

            self.loaded = load(path, options.foreign)
            self.chain = (FileDigest("checkpoint", path.name, self.loaded.sha256, path.stat().st_size),)
        except BaseException:
            self._stack.close()
            raise

    def start(self, work: Work, *, beside: bool) -> None:
        """At once, or, where memory or time is short, when the result is asked for."""
        from export.onnx.reference import is_large

        if beside and not is_large(self.loaded.model):
            self._process.start(self._path, self._given, work)
        else:
            self._later = work
        del self.loaded  # ONNX Runtime is about to need as much memory again

    def result(self, note: Note) -> Reference:
        """Wait for the process. Raises RefusedError when it refuses the checkpoint."""
        if self._later is not None:
            gc.collect()  # the exporter leaves cycles
            note("running the network as trained")
            self._process.start(self._path, self._given, self._later)
        return self._process.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class InMemory:
    """A network in memory. Its reference is computed here, before the exporter is imported, on a copy of its own."""

    chain: tuple[FileDigest, ...] = ()

    def __init__(self, live: Live) -> None:
        from gmconv import Checkpoint
        from gmconv.inputs import arguments_of, left_out
        from gmconv.surgery import masked_layers, refuse_script, refuse_valueless

        refuse_script(live.model, BakeError)
        refuse_valueless(live.model)
        arguments = arguments_of(live.model, live.examples)
        _refuse_dtypes(live.model, arguments.tensors)
        self._model, given = _copied(live.model), live.foreign
        image = next((one.shape for one in arguments.inputs if one.is_image), None)
        shape = None if image is None else (image[0], image[1], image[2])
        kind, prepared = type(live.model), preprocessing_of(given.preprocessing, shape)
        read = (*left_out(live.model, arguments.inputs), *sizing(given.preprocessing, prepared))
        self.examples = {name: tensor.detach().cpu().numpy() for name, tensor in arguments.tensors.items()}
        self.loaded = Checkpoint(
            model=_copied(live.model),
            arch=given.arch or f"{kind.__module__}.{kind.__qualname__}, in memory",
            arch_kwargs={},
            input_shape=shape,
            inputs=arguments.inputs,
            masked={name: layer.sigma_per for name, layer in masked_layers(live.model).items()},
            sha256=_digest(live.model),
            preprocessing=prepared,
            labels=given.labels,
            notes=("exported from memory", *_widened(live.model), *read),
        )
        self._reference: Reference | None = None

    def start(self, work: Work, *, beside: bool) -> None:
        """At once and here: what is computed before the exporter is imported cannot be coloured by its patches."""
        from export.onnx.reference import compute_reference

        self._reference = compute_reference(self._model, self.loaded.inputs, work)
        del self._model

    def result(self, note: Note) -> Reference:
        """What `start` computed."""
        assert self._reference is not None
        return self._reference

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _refuse_dtypes(model: nn.Module, examples: Mapping[str, Tensor]) -> None:
    """Raise RefusedError for what ONNX Runtime does not run on a CPU, or numpy does not have; half is widened."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.dtype in (torch.bfloat16, torch.float64):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise RefusedError(
                f"the network is in {kind} (parameter {name!r}), and an export starts from float32: pass its copy, "
                f"copy.deepcopy(model).float(), and examples.float()"
            )
    for name, tensor in examples.items():
        if tensor.dtype == torch.bfloat16:
            raise RefusedError(f"example {name!r} is in bfloat16, which numpy has not: pass it as .float()")


def _widened(model: nn.Module) -> list[str]:
    import torch

    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return ["its float16 parameters were widened to float32, in which it was proven"] if half else []


def _copied(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, half precision widened: the user's own network stays as it is."""
    import torch

    from gmconv.surgery import copied

    try:
        copy = copied(model)
    except SurgeryError as error:
        raise RefusedError(error.message) from error
    try:
        copy.cpu()
        copy.eval()  # an override may return nothing
    except Exception as error:
        raise RefusedError(
            f"the network cannot be brought to the CPU and into eval mode ({' '.join(str(error).split())[:200]})"
        ) from error
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in copy.parameters()):
        copy.float()
    return copy


def _digest(model: nn.Module) -> str:
    """sha256 over names, types and bytes of parameters and buffers."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        dense = tensor.detach().cpu().contiguous()
        found.update(f"{name} {dense.dtype} {tuple(dense.shape)}\n".encode())
        found.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b"")
    return found.hexdigest()
