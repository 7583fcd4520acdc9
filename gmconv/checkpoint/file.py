"""What a checkpoint file holds, read without running anything in it and without work that its size does not justify.

`torch.load(weights_only=True)` with one addition: the harmless types that training scripts leave in checkpoints
(`argparse.Namespace`, numpy scalars and arrays, `pathlib.Path`, configurations) become inert records. None of those
classes is imported, and nothing of them runs.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmconv.errors import CheckpointError, RefusedError, type_words
from gmconv.kinds import refuse_other_kinds
from gmconv.packages import install

_PICKLE_BYTES = 2**24  # of the pickle inside a checkpoint: about half a minute of torch's unpickler, written in Python
_PICKLE_READS = 2**23  # the same bound for files without a zip, whose pickle ends nowhere in particular
_UNREADABLE = "is not a readable PyTorch checkpoint (truncated, damaged or another format); copy or save it again"
_PROGRAMS = {
    "/constants.pkl": "TorchScript",
    "/archive_format": "torch.export",
    "/serialized_exported_program": "torch.export",
}
_INFLATED = 2**31, 32  # a compressed zip may unpack to 2 GiB, or to 32 times its size


def read_file(path: Path) -> dict[str, Any]:
    """The file's top-level dict; its `_metadata` (versions of modules) too, where it is a bare state_dict.

    Raises:
        CheckpointError: missing, damaged, too large for what it is, or holding objects that may run code.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; name the checkpoint file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is no regular file' if path.exists() else 'no such file'}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty; the training run or the copy did not finish")
    try:
        refuse_other_kinds(path, "checkpoint")
        loaded = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except ImportError as error:
        raise CheckpointError(f"{path}: reading it needs the safetensors package: {install('export')}") from error
    except CheckpointError:
        raise
    except RefusedError as error:
        raise CheckpointError(error.message) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a hostile file can make the unpickler raise anything
        raise CheckpointError(f"{path}: {_why_unreadable(error)}") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds {type_words(loaded)}, not a state_dict; save model.state_dict()")
    found: dict[str, Any] = OrderedDict((str(key), value) for key, value in loaded.items())
    if hasattr(loaded, "_metadata"):
        found._metadata = loaded._metadata  # type: ignore[attr-defined]
    return found


def _safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors; those left out because they are another one's (tied weights) under both names."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        for name, kept in (file.metadata() or {}).items():
            if kept in found:
                found.setdefault(name, found[kept])
    return found


def _torch(path: Path) -> Any:
    with path.open("rb") as stream:
        head = stream.read(4)
    zipped = head == b"PK\x03\x04"
    if not zipped and head[:1] != pickle.PROTO:  # what torch writes without a zip begins so; text can look like globals
        raise CheckpointError(f"{path}: {_UNREADABLE}")
    with torch.serialization.safe_globals(_STAND_INS):
        if zipped:
            # A compressed record must be unpacked; mapped, its compressed bytes would be taken for numbers.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=not _compressed(path))
        with path.open("rb") as stream:
            return torch.load(_Bounded(stream, path), map_location="cpu", weights_only=True)  # type: ignore[arg-type]


def _compressed(path: Path) -> bool:
    """Whether records of a zip are compressed. Refuses a zip bomb, a pickle that would take minutes, and programs."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    for mark, kind in _PROGRAMS.items():
        if any(mark in f"/{record.filename}" for record in records):
            raise CheckpointError(f"{path}: is a {kind} archive; save model.state_dict() of the Python model")
    pickled = max((record.file_size for record in records if record.filename.endswith("data.pkl")), default=0)
    if pickled > _PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: its pickle has {pickled:,} bytes, a checkpoint's has less than {_PICKLE_BYTES:,}; "
            f"save model.state_dict() alone"
        )
    compressed = [record for record in records if record.compress_type != zipfile.ZIP_STORED]
    unpacked, (least, ratio) = sum(record.file_size for record in compressed), _INFLATED
    if unpacked > max(least, ratio * path.stat().st_size):
        raise CheckpointError(f"{path}: would unpack to {unpacked:,} bytes; save it again without compression")
    return bool(compressed)


class _Bounded(io.BufferedIOBase):
    """A file from which a pickle may be read, but not without end."""

    def __init__(self, stream: io.BufferedReader, path: Path) -> None:
        self._stream, self._path, self._reads = stream, path, 0

    def _count(self) -> None:
        self._reads += 1
        if self._reads > _PICKLE_READS:
            raise CheckpointError(f"{self._path}: its pickle does not end; save model.state_dict() alone")

    def read(self, size: int | None = -1, /) -> bytes:
        self._count()
        return self._stream.read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self._count()
        return self._stream.readline(2**20 if size is None or size < 0 else size)

    def readinto(self, buffer: Any, /) -> int:
        return self._stream.readinto(buffer)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _why_unreadable(error: Exception) -> str:
    text = str(error)
    if "torch.distributed" in text:
        return "holds sharded tensors (DTensor); save a full state_dict, gathered on one rank"
    for marker in ("Unsupported global: GLOBAL ", "Unsupported class ", "unsupported GLOBAL "):
        if marker in text:
            name = text.split(marker, 1)[1].split()[0].rstrip(".,")
            return (
                f"holds a pickled {name}, and nothing in a checkpoint may run code; save model.state_dict(), and "
                f"beside it numbers, text, lists and dicts alone, or hand the network itself to gmconv.deploy"
            )
    return _UNREADABLE


class _Inert:
    """Stands in for an object of any harmless class: takes what its pickle says and does nothing with it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _Record(_Inert):
    """Stands in for a class with entries or attributes: a plain dict."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _Sequence(_Inert):
    """Stands in for a `collections.deque`: a list."""

    def __new__(cls, *_: Any) -> Any:
        return []


class _Dtype(_Inert):
    """A numpy dtype by its code, e.g. "f4"."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])


class NumpyArray(_Inert):
    """A pickled numpy array: shape, dtype and bytes as the file says, checked by `tensor`."""

    def __init__(self, *_: Any) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def tensor(self) -> Tensor:
        """The array as a tensor. Raises ValueError when it is no array of numbers."""
        try:
            _, shape, dtype, fortran, raw = self._state
            kind = np.dtype(dtype.code).newbyteorder(dtype.order if dtype.order in "<>" else "=")
            if kind.kind not in "fiub":
                raise ValueError(f"dtype {dtype.code!r}")
            array = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")
            return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C"))
        except (TypeError, ValueError, AttributeError, struct.error) as error:
            raise ValueError(f"is no array of numbers ({error})") from error


_NAMES: dict[type, str] = {
    _Record: """argparse.Namespace types.SimpleNamespace collections.defaultdict easydict.EasyDict addict.addict.Dict
        munch.Munch munch.munch.Munch box.box.Box yacs.config.CfgNode fvcore.common.config.CfgNode
        detectron2.config.config.CfgNode mmengine.config.config.ConfigDict mmengine.config.config.Config
        mmcv.utils.config.ConfigDict ml_collections.config_dict.config_dict.ConfigDict
        pytorch_lightning.utilities.parsing.AttributeDict lightning.pytorch.utilities.parsing.AttributeDict
        lightning_fabric.utilities.data.AttributeDict lightning.fabric.utilities.data.AttributeDict""",
    _Sequence: "collections.deque",
    _Dtype: "numpy.dtype",
    NumpyArray: "numpy._core.multiarray._reconstruct numpy.core.multiarray._reconstruct",
    _Inert: """numpy._core.multiarray.scalar numpy.core.multiarray.scalar numpy.ndarray
        pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath pathlib.PurePosixPath
        pathlib.PureWindowsPath pathlib._local.Path pathlib._local.PosixPath pathlib._local.WindowsPath
        datetime.datetime datetime.date datetime.time datetime.timedelta datetime.timezone uuid.UUID decimal.Decimal
        fractions.Fraction builtins.list builtins.dict builtins.tuple builtins.str builtins.int builtins.float
        builtins.bool builtins.frozenset builtins.range builtins.slice typing.Any torch.torch_version.TorchVersion
        omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.ContainerMetadata
        omegaconf.base.Metadata omegaconf.base.Node omegaconf.nodes.AnyNode omegaconf.nodes.StringNode
        omegaconf.nodes.IntegerNode omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode omegaconf.nodes.PathNode
        mmengine.logging.history_buffer.HistoryBuffer
        pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint
        pytorch_lightning.callbacks.early_stopping.EarlyStopping
        lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint
        lightning.pytorch.callbacks.early_stopping.EarlyStopping""",
}
_STAND_INS: list[Any] = [(stand_in, name) for stand_in, names in _NAMES.items() for name in names.split()]
