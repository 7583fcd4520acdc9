"""How a public function takes its options: an object of them, or flat, by the names and values of its command.

`time_artefacts("m.onnx", duration=1)` asks for what `gmconv benchmark m.onnx --duration 1` does, and what a message
advises as a flag is a parameter to whoever calls from Python.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from numbers import Number
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, cast

import click

from gmconv.errors import RefusedError, UnavailableError, type_words
from gmconv.files import file_named
from gmconv.foreign import labels_of, preprocessing_fields
from gmconv.packages import missing

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
_OUTER = ContextVar("_OUTER", default=False)  # whether a function at work has translated words already
_PLAIN = (str, Path, Number, tuple, list)
#: A flag, and what it is advised with: a placeholder (DIR, FILE.npz), a number or a word that is one of its values.
_FLAG = re.compile(
    r"(?<![\w-])(?:--keep-fp32 (?P<layers>[^\s;,)]+(?: --keep-fp32 [^\s;,)]+)*)|(?P<flag>--[a-z][A-Za-z0-9-]*|-o)"
    r"(?: (?P<file>[\w./-]+\.(?:onnx|plan)\b)"
    r"| (?P<value>[A-Z][A-Z,:|]*(?:\.npz)?|\d[\w.]*|digits|lossless|fp16|bf16|int8|fp8|rtx)(?![\w-]))?)"
)
_NORMALIZED = re.compile(r"--mean(?: M,M,M)?(?: and)? --std(?: S,S,S)?(?: \(or --preprocessing FILE\))?")


class Asked(Generic[T]):
    """The options `kind` of one public function, which may be said flat."""

    def __init__(
        self,
        kind: type[T],
        command: str,
        *,
        groups: Mapping[str, type | tuple[str, ...]] | None = None,
        renamed: Mapping[str, str] | None = None,
        objects: tuple[str, ...] = (),
        without: tuple[str, ...] = (),
        phrases: Mapping[str, str] | None = None,
    ) -> None:
        """`command`: "module:name", whose flags read the values.

        groups: fields of `kind` that hold options of their own, and the class of those, or the keys where it is a dict.
        renamed: other names, and what they mean: "field" or "group.field"; with a comma, whichever of several nothing
        else says. objects: names that take more than a command line can say. without: fields that cannot be said.
        phrases: what a message says, and what in its place.
        """
        self.kind, self._command, self._groups, self._objects = kind, command, dict(groups or {}), set(objects)
        self._renamed, self._phrases = dict(renamed or {}), dict(phrases or {})
        self._places = {name: f"{group}.{name}" for group, part in self._groups.items() for name in _names(part)}
        self._places |= {name: name for name in _names(kind)}
        for name in (*without, "labels_file", "usual_inputs", "beside"):
            self._places.pop(name, None)
        self._places |= {name: where for name, where in self._renamed.items() if where not in self._places}
        self._known = {*self._places, *self._renamed, *(("mean", "std") if "foreign" in self._groups else ())}
        self._switches = {
            f.name for k in (kind, *self._groups.values()) if isinstance(k, type) for f in fields(k) if f.type == "bool"
        }
        self.function = ""

    def of(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate the function: what it refuses names parameters, unless a command calls it.

        What is annotated as `str | Path | ...` raises TypeError where it is neither that nor anything else named there.
        """
        self.function, signature = function.__name__, inspect.signature(function)
        for parameter in signature.parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "options":
                self._known.add(parameter.name)
                self._switches |= {parameter.name} if parameter.annotation == "bool" else set()

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._words():
                self._require_files(signature, args, kwargs)
                return function(*args, **kwargs)

        return called

    def _require_files(self, signature: inspect.Signature, args: Any, kwargs: Any) -> None:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the function says it better
            return
        for name, value in given.items():
            takes = str(signature.parameters[name].annotation)
            if not takes.startswith("str | Path") or type(value).__name__.removesuffix("Type") in takes.split(" | "):
                continue
            several = "[" in takes and isinstance(value, Iterable) and not hasattr(value, "state_dict")
            for one in (value if isinstance(value, list | tuple) else ()) if several else [value]:
                file_named(one, f"{self.function}: {name}")

    def __call__(self, base: T | None, given: Mapping[str, Any]) -> T:
        """`base`, or the defaults, with what is `given` flat.

        Raises TypeError for a name that there is not, RefusedError for a value that the command would not take.
        """
        if base is not None and not isinstance(base, self.kind):
            kinds = f"{self.kind.__name__}, or its fields by name ({', '.join(list(self._places)[:3])}, ...)"
            raise TypeError(f"{self.function}: options is {type_words(base)}; it takes {kinds}")
        if unknown := sorted(given.keys() - self._known):
            close = difflib.get_close_matches(unknown[0], self._known, n=1)
            advice = f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(self._known))}"
            raise TypeError(f"{self.function} takes no {unknown[0]!r}; {advice}")
        values = self._read({name: value for name, value in given.items() if value is not None})
        parts: dict[str, dict[str, Any]] = {"": {}}
        for name in sorted(values, key=lambda name: "," in self._places[name]):
            soft = "," in self._places[name]
            for place in filter(None, self._places[name].split(",")):
                group, _, field = place.rpartition(".")
                said = values.get(group) or getattr(base, group, None) if group else base
                if not soft or (field not in parts.get(group, {}) and getattr(said, field, None) is None):
                    parts.setdefault(group, {})[field] = values[name]
        own = parts.pop("")
        for group, flat in parts.items():
            part, said = self._groups[group], own.get(group) or getattr(base, group, None)
            own[group] = replace(said or part(), **flat) if isinstance(part, type) else {**(said or {}), **flat}
        return replace(cast(Any, base), **own) if base is not None else self.kind(**own)

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        """The values as the command's own flags read them, under the names of fields."""
        flags, context = self._flags()
        values = _foreign(given) if "foreign" in self._groups else {}
        for name, value in given.items():
            field = self._renamed.get(name, name)
            group = self._groups.get(name)
            if field not in self._places or (group and not isinstance(value, str | tuple | list)):
                field = name
            also_named = [other for other, meant in self._renamed.items() if meant == field]
            flag = next((flags[one] for one in (name, field, *also_named) if one in flags), None)
            if isinstance(group, type) and field == name:
                if not isinstance(value, group):
                    also = "'fp16,int8', or " if name in self._renamed else ""
                    raise RefusedError(f"{name} is {type_words(value)}; it takes {also}{group.__name__}")
            elif flag is not None and not (field in self._objects and not isinstance(value, str)):
                for one in (value, *(value if isinstance(value, tuple | list) else ())):
                    if not isinstance(one, _PLAIN) and getattr(one, "ndim", None) != 0:
                        takes = getattr(flag, "metavar", None) or "a plain value"
                        holds = "" if one is value else f" of {type(one).__name__}"
                        raise RefusedError(f"{name} is {type_words(value)}{holds}; it takes {takes}")
                value = _parsed(flag, context, name, value)
            values[field] = value
        return values

    def _flags(self) -> tuple[dict[str, click.Parameter], click.Context]:
        module, _, name = self._command.partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        shown = [flag for flag in command.params if not getattr(flag, "hidden", False)]
        found = {str(flag.name): flag for flag in shown}
        for flag in shown:
            found |= {_snake(option): flag for option in flag.opts if option.startswith("--")}
        return found, click.Context(command)

    @contextmanager
    def _words(self) -> Iterator[None]:
        """Have whatever is refused meanwhile say parameters in place of flags, and what is not installed how to install
        it, unless a command is at work."""
        if _OUTER.get() or click.get_current_context(silent=True) is not None:
            yield
            return
        token = _OUTER.set(True)
        try:
            yield
        except click.ClickException as error:
            said = type(error)(self.in_python(error.message))
            raise said.with_traceback(error.__traceback__) from None  # the exporter's chain is hundreds of lines
        except ModuleNotFoundError as error:
            if sentence := missing(error):
                raise UnavailableError(sentence) from error
            raise
        finally:
            _OUTER.reset(token)

    def in_python(self, message: str) -> str:
        """`message` with `keep_dynamic=True` where it says `--keep-dynamic`; a flag that is no parameter stays."""
        for shell, python in self._phrases.items():
            message = message.replace(shell, python)
        if "preprocessing" in self._known:
            message = _NORMALIZED.sub('preprocessing={"mean": (M, M, M), "std": (S, S, S)}', message)
        return _FLAG.sub(self._parameter, message)

    def _parameter(self, found: re.Match[str]) -> str:
        if found["layers"]:
            layers = tuple(layer.strip("'") for layer in found["layers"].split(" --keep-fp32 "))
            return f"keep_fp32={layers if len(layers) > 1 else layers[0]!r}" if "keep_fp32" in self._known else found[0]
        name, value = "output" if found["flag"] == "-o" else _snake(found["flag"]), found["value"]
        off = name.removeprefix("no_")
        if off != name and off in self._switches & self._known:
            name, switch = off, "=False"
        else:
            switch = "=True" if name in self._switches else ""
        if name not in self._known:
            return found[0]
        if switch:
            return f"{name}{switch}" + (f" {value}" if value else "")
        if found["file"]:
            return f"{name}={found['file']!r}"
        if value and value.islower() and not value[0].isdigit():
            value = repr(value)
        return f"{name}={value}" if value else name


def silent(*_: object) -> None:
    """Where nobody wants to know which step begins."""


def _names(kind: type | tuple[str, ...]) -> list[str]:
    return [field.name for field in fields(kind)] if isinstance(kind, type) else list(kind)


def _snake(flag: str) -> str:
    """`--keep-fp32` and `--warmUp` as names."""
    return re.sub("(?<=[a-z])[A-Z]", lambda found: f"_{found[0]}", flag.lstrip("-")).replace("-", "_").lower()


def _parsed(flag: click.Parameter, context: click.Context, name: str, value: Any) -> Any:
    given: Any = value.item() if hasattr(value, "item") else value
    if getattr(flag, "multiple", False):
        given = value if isinstance(value, tuple | list) else [value]
    elif isinstance(value, tuple | list):
        given = ",".join(map(str, value))
    try:
        return flag.process_value(context, given)
    except click.UsageError as error:
        raise RefusedError(f"{name}={value!r}: {error.message.removeprefix(f'{flag.opts[0]}: ')}") from None


def _foreign(given: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint does not say of itself, in whichever form; taken out of `given`."""
    found: dict[str, Any] = {}
    if "labels" in given:
        found["labels"] = labels_of(given.pop("labels"))
    said = {name: given.pop(name) for name in ("mean", "std") if name in given}
    if said or "preprocessing" in given:
        found["preprocessing"] = {**(preprocessing_fields(given.pop("preprocessing", None)) or {}), **said}
    return found
