"""What a checkpoint of somebody else's training script does not say of itself: one object, and the options for it.

Every command that can meet a checkpoint takes the same options: `@foreign_options` hands it one `Foreign`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click

from gmconv.cli import Whole
from gmconv.errors import RefusedError, printable, type_words
from gmconv.kinds import artefact_kind

if TYPE_CHECKING:
    from gmconv.preprocessing import Preprocessing

OTHERWISE = "images are prepared otherwise than the checkpoint says itself: "
_LARGEST = 2**24  # bytes of a file of labels or of preprocessing


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """Keyword arguments of `gmconv.load_checkpoint`; None: the file says it itself.

    `arch` is a factory, `"package.module:factory"`, looked for on the import path and in the working directory.
    `input_shape` is `(C, H, W)` of one image; a network of several inputs, or of none that is an image, has `inputs`
    instead, `(name, shape of one sample, dtype)` of each. `preprocessing` has fields of
    `gmconv.preprocessing.Preprocessing`. `labels_file` is where `labels` were read. `weights` is where in the
    file the weights are, `"state_dict_ema"` or `"ema.module"`. `usual_inputs` are what other files of the
    network say, for a checkpoint of which nothing else does; `beside` are those files.
    """

    arch: str | None = None
    num_classes: int | None = None
    input_shape: tuple[int, int, int] | None = None
    preprocessing: Mapping[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    inputs: tuple[tuple[str, tuple[int, ...], str], ...] | None = None
    labels_file: Path | None = None
    weights: str | None = None
    usual_inputs: tuple[tuple[str, tuple[int, ...], str], ...] | None = None
    beside: tuple[Path, ...] = field(default=(), compare=False)

    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        values = {name: getattr(self, name) for name in _ASKED}
        return {name: value for name, value in values.items() if value is not None}

    def refuse_idle(self, paths: Sequence[Path]) -> None:
        """Raise RefusedError, naming the option, where one describes a checkpoint and none is among the files read."""
        if any(artefact_kind(path) == "checkpoint" for path in paths):
            return
        names = {"arch": "--arch", "num_classes": "--num-classes", "input_shape": "--input-shape"}
        names |= {"inputs": "--input", "weights": "--weights", "labels": "--labels"}
        if idle := [flag for name, flag in names.items() if getattr(self, name) is not None]:
            files = ", ".join(dict.fromkeys(path.name for path in paths))
            raise RefusedError(f"{idle[0]} describes a checkpoint, and none is read here ({files}): leave it out")


_ASKED = [one.name for one in fields(Foreign) if one.name not in ("labels_file", "usual_inputs", "beside")]
NOTHING = Foreign()


def foreign_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a click command, whose function gets one keyword argument `foreign`."""

    @functools.wraps(command)
    def collected(*args: Any, **values: Any) -> Any:
        mean, std, file = (values.pop(name) for name in ("mean", "std", "preprocessing"))
        preprocessing = dict(file or {})
        preprocessing |= {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
        own = {name: values.pop(name) for name in ("arch", "num_classes", "input_shape", "labels_file", "weights")}
        own["inputs"] = values.pop("own_inputs")
        own["labels"] = read_labels(own["labels_file"]) if own["labels_file"] else None
        return command(*args, foreign=Foreign(**own, preprocessing=preprocessing or None), **values)

    for option in reversed(_OPTIONS):
        collected = option(collected)
    return collected


def parse_shape(text: str) -> tuple[int, int, int]:
    """`3,224,224` or `3x224x224`. Raises ValueError."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{printable(text)!r} is not C,H,W, for example 3,224,224")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _image_shape(text: str) -> tuple[int, int, int]:
    try:
        return parse_shape(text)
    except ValueError as error:
        other = "x:512" if not re.fullmatch(r"[\d,x ]+", text) else f"x:{text.replace(' ', '')}"
        raise ValueError(f"{error}; an input that is no image is told as --input NAME:SHAPE, such as {other}") from None


def parse_inputs(texts: Sequence[str]) -> tuple[tuple[str, tuple[int, ...], str], ...] | None:
    """`image:3,224,224` and `age:1:int64` as name, shape of one sample, dtype. Raises ValueError."""
    found: list[tuple[str, tuple[int, ...], str]] = []
    for text in texts:
        name, colon, rest = text.partition(":")
        sizes, _, dtype = rest.partition(":")
        parts = [part.strip() for part in sizes.replace("x", ",").split(",") if part.strip()]
        if not name or not colon or not all(part.isdecimal() and 0 < int(part) < 2**24 for part in parts):
            raise ValueError(
                f"{printable(text)!r} is not NAME:SHAPE[:DTYPE], for example mask:1,224,224, audio:1,16000 or "
                f"tokens:12:int64; DTYPE is one of {', '.join(DTYPES)}"
            )
        if dtype not in ("", *DTYPES):
            raise ValueError(f"{printable(text)!r}: {printable(dtype)!r} is none of {', '.join(DTYPES)}")
        if name in (one[0] for one in found):
            raise ValueError(f"{printable(name)!r} is given twice")
        found.append((name, tuple(int(part) for part in parts), dtype or "float32"))
    return tuple(found) or None


def parse_numbers(text: str) -> tuple[float, ...]:
    """`0.485,0.456,0.406`. Raises ValueError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of numbers such as 0.485,0.456,0.406") from None


def read_labels(file: Path) -> tuple[str, ...]:
    """Class names, one a line or a JSON list, in the order of the logits. Raises RefusedError."""
    text = _text(file).strip()
    try:
        found = json.loads(text) if text.startswith("[") else [line.strip() for line in text.splitlines()]
    except ValueError as error:
        raise RefusedError(f"{file}: not a JSON list of labels ({error})") from error
    if not _are_labels(found):
        raise RefusedError(f"{file}: not a list of labels; write one name a line, in the order of the logits")
    return tuple(found)


def labels_of(given: str | os.PathLike[str] | Iterable[str] | None) -> tuple[str, ...] | None:
    """Class names as a caller gives them: a file, as `read_labels` reads it, or names. Raises RefusedError."""
    if isinstance(given, str | os.PathLike):
        return read_labels(Path(given))
    found: Any = given
    if isinstance(given, Iterable):
        found = tuple(str(label) if isinstance(label, str) else label for label in given)  # numpy has a str of its own
    if found and not _are_labels(found):
        said = printable(repr(given))
        raise RefusedError(f"labels: {said} is no list of class names in the order of the logits, nor a file of them")
    return found or None


def _are_labels(found: Any) -> bool:
    listed = isinstance(found, list | tuple) and len(found) > 0
    return listed and all(isinstance(label, str) and label and label.isprintable() for label in found)


def refuse_labels(labels: Sequence[str] | None, outputs: Sequence[Sequence[int | str]], given: Foreign) -> None:
    """Raise RefusedError where there are labels of another number than the classes of the first output (N, K).

    `labels`: of the checkpoint as it was loaded; `outputs`: the shapes of what it returns; `given`: with it.
    """
    classes = next((shape[1] for shape in outputs if len(shape) == 2), None)
    if labels is None or not isinstance(classes, int) or classes < 2 or len(labels) == classes:
        return
    whose = "the checkpoint's labels" if given.labels is None else given.labels_file or "labels"
    raise RefusedError(f"{whose}: {len(labels)} names for the network's {classes} classes; give one for each class")


def read_preprocessing_file(file: Path) -> dict[str, Any]:
    """Fields of `gmconv.preprocessing.Preprocessing` from a JSON object, or from a manifest that has them.

    Raises RefusedError.
    """
    try:
        found = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{file}: not a JSON file ({error})") from error
    if isinstance(found, dict) and isinstance(found.get("preprocessing"), dict):
        found = found["preprocessing"]
    if not isinstance(found, dict):
        raise RefusedError(f"{file}: not a JSON object with the fields size, mean, std, scale, channel_order, ...")
    return found


def preprocessing_fields(given: Mapping[str, Any] | str | os.PathLike[str] | None) -> Mapping[str, Any] | None:
    """Preprocessing as a caller gives it: fields of `gmconv.preprocessing.Preprocessing`, or a file that has them.

    Raises RefusedError as `read_preprocessing_file`, and where it is none, or has a field of another name.
    """
    from gmconv.preprocessing import Preprocessing

    found: Any = read_preprocessing_file(Path(given)) if isinstance(given, str | os.PathLike) else given
    if found is None or (isinstance(found, Mapping) and not found):
        return None
    names = [one.name for one in fields(Preprocessing)]
    takes = f"it takes a dict, or a JSON file, with {', '.join(names)}"
    if not isinstance(found, Mapping):
        raise RefusedError(f"preprocessing is {type_words(found)}; {takes}")
    if unknown := [str(name) for name in found if name not in names]:
        where = printable(f"{given}: the preprocessing" if isinstance(given, str | os.PathLike) else "preprocessing")
        raise RefusedError(f"{where} has a field {printable(unknown[0])!r}; {takes}")
    return found


def preprocessing_of(
    given: Mapping[str, Any] | str | os.PathLike[str] | None,
    shape: Sequence[int] | None,
    own: Preprocessing | None = None,
) -> Any:
    """`preprocessing_fields`, as a dict, with what it does not say: the checkpoint's `own`, else the network's, of
    `shape` (C, H, W), unscaled.

    Raises RefusedError, also where a field is of another type, or the network takes no image (`shape` None).
    """
    import msgspec

    from gmconv.preprocessing import Preprocessing

    said = preprocessing_fields(given)
    if said is None:
        return None
    if shape is None:
        raise RefusedError("preprocessing is of images, and none of the network's inputs is one: leave it out")
    if own is None and ("mean" in said) != ("std" in said):
        one, other = ("mean", "std") if "mean" in said else ("std", "mean")
        raise RefusedError(f"preprocessing: has a {one} and no {other}; give both (--mean M,M,M --std S,S,S)")
    if own is not None and {"mean", "std"} & said.keys() and "scale" not in said and abs(own.scale * 255 - 1) > 1e-6:
        raise RefusedError(
            f"preprocessing: the checkpoint's scale is {own.scale:g}, and that of 0..1 is 1/255: give a scale too, "
            f"with the mean and std that go with it (--preprocessing FILE)"
        )
    channels, height, width = shape
    usual: dict[str, Any] = {"size": (height, width), "mean": (0.0,) * channels, "std": (1.0,) * channels}
    usual |= {"channel_order": "L" if channels == 1 else "RGB"}
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in said.items()}
    full = {**(asdict(own) if own else usual), **plain}
    try:
        msgspec.convert(full, Preprocessing)
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "").replace("$.", "")
        choices = get_args(get_type_hints(Preprocessing).get(reason.rpartition(" ")[2]))
        takes = "mean and std take one number for each channel, size (height, width)"
        if choices and all(isinstance(choice, str) for choice in choices):
            takes = f"it is one of {', '.join(choices)}"
        raise RefusedError(f"preprocessing: {reason}; {takes}") from None
    if float(full.get("scale", 1 / 255)) <= 1 / 255 and max(map(float, full["mean"]), default=0) > 1:
        raise RefusedError(
            "preprocessing: the mean is one of pixels in 0..255, and they are scaled to 0..1 before it is taken off: "
            "divide mean and std by 255, or give a scale of 1 (--preprocessing FILE)"
        )
    return full


def sizing(given: Mapping[str, Any] | str | os.PathLike[str] | None, full: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A note on how photos come to the size of a network whose checkpoint says nothing of it, where nobody did.

    `given`: as for `preprocessing_of`; `full`: what that returned.
    """
    said = preprocessing_fields(given)
    if said is None or full is None or "resize" in said:
        return ()
    height, width = full["size"]
    return (
        f"photos are stretched to {height} x {width} (height x width), as nothing says otherwise: scaled by their "
        f"shortest side and cropped in training, they need --preprocessing FILE with a resize of shortest-then-crop",
    )


def _text(file: Path) -> str:
    try:
        if not file.is_file():
            raise RefusedError(f"{file}: {'is a directory; give a file' if file.is_dir() else 'no such file'}")
        if file.stat().st_size > _LARGEST:
            raise RefusedError(f"{file}: has more than {_LARGEST:,} bytes")
        return file.read_text()
    except OSError as error:
        raise RefusedError(f"{file}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise RefusedError(f"{file}: is no text file") from error


def _parsed(parse: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(_: click.Context, __: click.Parameter, value: Any) -> Any:
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise click.BadParameter(printable(str(error), 400)) from error

    return callback


DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_FILE = click.Path(path_type=Path)
_OPTIONS: list[Callable[[Any], Any]] = [
    click.option("--arch", help="Of a foreign checkpoint: package.module:factory, timm:NAME, torchvision:NAME."),
    click.option(
        "--weights", metavar="KEY", help="Which of several sets of weights in a checkpoint: state_dict_ema, ema.module."
    ),
    click.option("--num-classes", type=Whole(1), help="Passed to the factory of --arch."),
    click.option(
        "--input-shape", callback=_parsed(_image_shape), metavar="C,H,W", help="Of one image, for a foreign checkpoint."
    ),
    click.option(
        "--input",
        "own_inputs",  # parity has --inputs
        multiple=True,
        callback=_parsed(parse_inputs),
        metavar="NAME:SHAPE[:DTYPE]",
        help="One input of any rank, by its forward's name (repeat for several).",
    ),
    click.option(
        "--mean",
        callback=_parsed(parse_numbers),
        metavar="M,M,M",
        help="Mean of the images, 0..1 per channel; photos are stretched to the input's size, unless --preprocessing "
        "has a resize. [a checkpoint's own]",
    ),
    click.option(
        "--std",
        callback=_parsed(parse_numbers),
        metavar="S,S,S",
        help="Deviation of the images, 0..1 per channel. [a checkpoint's own]",
    ),
    click.option(
        "--preprocessing",
        type=_FILE,
        callback=_parsed(read_preprocessing_file),
        metavar="FILE.json",
        help="Of the images: size, mean, std, scale, channel_order, interpolation, crop_ratio, resize (stretch "
        "where it is not said, or shortest-then-crop as torchvision's Resize and CenterCrop).",
    ),
    click.option("--labels", "labels_file", type=_FILE, metavar="FILE", help="Names of the classes, one a line."),
]
