"""Checkpoints: the only reader of `.pt` and `.safetensors` files, and what it refuses.

Always `weights_only=True`: nothing in a file may run code. Architecture factories come from three namespaces
(`gmconv.models:NAME`, `torchvision.models:NAME`, `timm:NAME`) unless the caller, not the file, names another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gmconv.architecture import build, plain_kwargs
from gmconv.errors import CheckpointError
from gmconv.surgery import convert, masked_layers

SCHEMA = "gmconv-deploy.checkpoint/v1"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A trained network and what is known of it.

    `model` is live (masks computed in forward), in eval mode, float32 (float64 where it was stored so), on the CPU.
    `input_shape` is `(C, H, W)`. `preprocessing` has the fields of `runtime.manifest.Preprocessing`. `notes` says what
    was read between the lines of a foreign file. `sha256` is of the file's bytes.
    """

    model: nn.Module
    arch: str
    arch_kwargs: dict[str, Any]
    input_shape: tuple[int, int, int]
    masked: dict[str, str]
    sha256: str
    preprocessing: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    dataset: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    arch: str,
    input_shape: tuple[int, int, int],
    arch_kwargs: Mapping[str, Any] | None = None,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    labels: tuple[str, ...] | None = None,
    dataset: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write one file that `load_checkpoint` turns back into this model; atomic.

    Args:
        path: of the file, usually `*.pt`.
        model: live (its GMConv2d layers are recorded by name) or plain.
        arch: `"gmconv.models:resnet20"`, `"torchvision.models:NAME"`, `"timm:NAME"`, or
            `"package.module:factory"`, which `load_checkpoint` accepts only with `arch=` said again.
        input_shape: `(C, H, W)` of one sample.
        arch_kwargs: keyword arguments of the factory (plain values).
        preprocessing: fields of `runtime.manifest.Preprocessing`.
        labels: class names in the order of the logits.
        dataset: how to find the data it was trained on, e.g. `{"name": "digits", "test_size": 0.2, "split_seed": 0}`.
        training: anything worth keeping (epochs, accuracy, seed).

    Raises:
        CheckpointError: the architecture does not rebuild this model, or the file cannot be written.
    """
    path = Path(path)
    kwargs = plain_kwargs(arch_kwargs or {}, str(path))
    masked: dict[str, str] = {name: layer.sigma_per for name, layer in masked_layers(model).items()}
    state = {key: value.detach() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    record = {
        "schema": SCHEMA,
        "arch": arch,
        "arch_kwargs": kwargs,
        "masked": masked,
        "input_shape": _input_shape(input_shape, str(path)),
        "preprocessing": dict(preprocessing) if preprocessing else None,
        "labels": list(labels) if labels else None,
        "dataset": dict(dataset) if dataset else None,
        "training": dict(training) if training else None,
        "state_dict": state,
    }
    skeleton = _skeleton(arch, kwargs, masked, str(path), trusted=True)
    _require_same_keys(skeleton, state, f"{path}: {arch} with {kwargs} does not rebuild this model")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as stream:
            torch.save(record, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
) -> Checkpoint:
    """Read a checkpoint of ours, or a foreign state_dict when `arch` says what it belongs to.

    Foreign files may be a bare state_dict, one wrapped under `state_dict`, `model`, `ema`, ..., with keys prefixed
    `module.` or `_orig_mod.`, on CUDA, in half precision (widened to float32, which is exact), or
    `.safetensors`. Masked layers are found from their `sigma` keys.

    Args:
        path: the file.
        arch: overrides the file's own; any `package.module:factory`, because the caller is trusted and the file is not.
        num_classes: passed to the factory.
        input_shape: `(C, H, W)`, for files that do not know it.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, NaN or Inf, or does not fit its architecture.
        ArchitectureUnavailableError: the architecture's package is not installed.
    """
    path = Path(path)
    raw = _read(path)
    ours = raw.get("schema") == SCHEMA
    if not ours and isinstance(raw.get("schema"), str):
        raise CheckpointError(f"{path}: schema {raw['schema'][:80]!r} is unknown here; this version reads {SCHEMA!r}")
    state, notes = _state_dict(raw, path)
    kwargs = plain_kwargs(raw.get("arch_kwargs") or {}, str(path)) if ours else {}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    name = arch or (raw.get("arch") if ours else None)
    shape = input_shape or (raw.get("input_shape") if ours else None)
    if not isinstance(name, str):
        raise CheckpointError(
            f"{path}: does not say its architecture; give --arch NAME (and --num-classes, --input-shape)"
        )
    if shape is None:
        raise CheckpointError(f"{path}: does not say its input shape; give --input-shape C,H,W")
    masked = _masked(raw.get("masked") if ours else None, state, path)
    model = _skeleton(name, kwargs, masked, str(path), trusted=arch is not None)
    _require_same_keys(model, state, f"{path}: does not fit {name}")
    _require_finite(state, path)
    model = _fill(model, state, lambda: _build_real(name, kwargs, masked, str(path), trusted=arch is not None))
    extra = {key: raw.get(key) if ours else None for key in ("preprocessing", "dataset", "training", "labels")}
    for key in ("preprocessing", "dataset", "training"):
        if extra[key] is not None and not isinstance(extra[key], dict):
            raise CheckpointError(f"{path}: its {key} is a {type(extra[key]).__name__}, not a dict; save it again")
    labels = extra["labels"]
    if labels is not None and not (isinstance(labels, list | tuple) and all(isinstance(item, str) for item in labels)):
        raise CheckpointError(f"{path}: its labels are not a list of strings; save it again")
    return Checkpoint(
        model=model.eval(),
        arch=name,
        arch_kwargs=kwargs,
        input_shape=_input_shape(shape, str(path)),
        masked=masked,
        sha256=_sha256(path),
        preprocessing=extra["preprocessing"],
        labels=tuple(labels) if labels else None,
        dataset=extra["dataset"],
        training=extra["training"],
        notes=tuple(notes),
    )


def _read(path: Path) -> dict[str, Any]:
    """The file's top-level dict, without running anything in it."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; name the checkpoint file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty; the training run or the copy did not finish")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with path.open("rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except ImportError as error:
        raise CheckpointError(f"{path}: reading it needs the safetensors package: pip install safetensors") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a hostile file can make the unpickler raise anything
        raise CheckpointError(f"{path}: {_why_unreadable(error)}") from error
    if isinstance(loaded, Mapping):
        return {str(key): value for key, value in loaded.items()}
    raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a state_dict; save model.state_dict()")


def _why_unreadable(error: Exception) -> str:
    text = str(error)
    for marker in ("Unsupported global: GLOBAL ", "Unsupported class "):
        if marker in text:
            name = text.split(marker, 1)[1].split()[0].rstrip(".,")
            return (
                f"holds a pickled {name}, and nothing in a checkpoint may run code; save model.state_dict() instead "
                f"of the model or its arguments"
            )
    return "is not a readable PyTorch checkpoint (truncated, damaged or another format); copy or save it again"


def _state_dict(raw: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    notes: list[str] = []
    state: Any = raw
    if not any(isinstance(value, Tensor) for value in raw.values()):
        wrappers = [key for key in _WRAPPERS if isinstance(raw.get(key), Mapping)]
        if not wrappers:
            kept = ", ".join(list(raw)[:_SHOWN]) or "nothing"
            raise CheckpointError(f"{path}: holds no state_dict (its keys: {kept}); save model.state_dict()")
        state = raw[wrappers[0]]
        if len(wrappers) > 1:
            notes.append(
                f"weights taken from {wrappers[0]!r}; the file also holds {', '.join(map(repr, wrappers[1:]))}"
            )
    cleaned: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key)
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        if not isinstance(value, Tensor) or value.is_sparse or value.is_quantized:
            raise CheckpointError(f"{path}: entry {name!r} is not a dense tensor; save a plain state_dict")
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        if name in cleaned:
            raise CheckpointError(f"{path}: holds {name!r} twice, with and without a prefix; save one of them")
        cleaned[name] = value
    return cleaned, notes


def _masked(recorded: Any, state: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Masked layers and their `sigma_per`: as recorded, or from the sigma keys beside 4-d weights."""
    if isinstance(recorded, dict) and all(v in ("layer", "channel") for v in recorded.values()):
        return {str(k): str(v) for k, v in recorded.items()}
    if recorded is not None:
        raise CheckpointError(f"{path}: its list of masked layers is damaged; save it again")
    found = {}
    for key, sigma in state.items():
        layer = key.removesuffix(".sigma")
        weight = state.get(f"{layer}.weight")
        if layer == key or weight is None or weight.ndim != 4:
            continue
        if sigma.numel() not in (1, weight.shape[0]):
            raise CheckpointError(
                f"{path}: {key} has {sigma.numel()} values; a static mask has 1, or one for each of its "
                f"{weight.shape[0]} output channels"
            )
        found[layer] = "layer" if sigma.numel() == 1 else "channel"
    return found


def _skeleton(arch: str, kwargs: dict[str, Any], masked: dict[str, str], where: str, *, trusted: bool) -> nn.Module:
    """The architecture with its masks, on the meta device if its constructor allows: no memory, no initialisation."""
    try:
        with torch.device("meta"):
            return _build_real(arch, kwargs, masked, where, trusted=trusted)
    except (NotImplementedError, RuntimeError):  # a constructor that looks at values
        return _build_real(arch, kwargs, masked, where, trusted=trusted)


def _build_real(arch: str, kwargs: dict[str, Any], masked: dict[str, str], where: str, *, trusted: bool) -> nn.Module:
    model = build(arch, kwargs, where, trusted=trusted)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in masked:
        if not isinstance(modules.get(name), nn.Conv2d):
            raise CheckpointError(f"{where}: {arch} has no convolution named {name!r} to put its mask on; check --arch")
    for per in ("layer", "channel"):
        names = {name for name, value in masked.items() if value == per}
        if names:
            convert(model, sigma_per=per, where=lambda name, _, names=names: name in names, inplace=True)  # type: ignore[misc]
    return model


def _fill(model: nn.Module, state: dict[str, Tensor], rebuild: Any) -> nn.Module:
    """Load `state`; rebuild off the meta device if something that no state_dict holds (a table) needs values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if any(tensor.is_meta for name, tensor in tensors.items() if name not in state):
        model = rebuild()
    model.load_state_dict(state, strict=False, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _require_same_keys(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    want = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing = [key for key in want if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in want]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, should be {tuple(want[key].shape)}"
        for key in want
        if key in state
        and state[key].shape != want[key].shape
        and not (key.endswith("sigma") and state[key].numel() == want[key].numel())
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes)]
    found = [f"{len(keys)} {title}: {_first(keys)}" for title, keys in parts if keys]
    if found:
        raise CheckpointError(f"{what}; {'; '.join(found)}")


def _first(keys: list[str]) -> str:
    rest = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _require_finite(state: Mapping[str, Tensor], path: Path) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {key} holds NaN or Inf; the training diverged or the file is damaged")


def _input_shape(shape: Any, where: str) -> tuple[int, int, int]:
    if (
        isinstance(shape, list | tuple)
        and len(shape) == 3
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 65536 for n in shape)
    ):
        return (shape[0], shape[1], shape[2])
    raise CheckpointError(f"{where}: input shape {str(shape)[:80]} is not C,H,W in pixels")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
