"""Libraries that may be missing: which of our extras brings each, and the command that installs it where we run.

The command is derived from how this package was installed (pip or uv; from a checkout, a wheel, git or an index), so
that it works as it is printed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

from gmconv.errors import RefusedError, UnavailableError

_DISTRIBUTION = "gmconv-deploy"
#: Top-level module of a library: the extra that brings it.
EXTRAS = {
    **dict.fromkeys(("torch", "onnx", "onnxscript", "onnx_ir", "onnxslim", "safetensors", "ml_dtypes"), "export"),
    **dict.fromkeys(("sklearn", "PIL", "google"), "export"),
    "onnxruntime": "cpu",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    **dict.fromkeys(("cuda", "pynvml"), "cuda"),
    "pycuda": "pycuda",
    **dict.fromkeys(("jinja2", "matplotlib"), "report"),
    **dict.fromkeys(("httptools", "uvloop", "h2", "tritonclient", "grpc", "grpc_health", "grpc_reflection"), "serve"),
    "prometheus_client": "serve",
    "opentelemetry": "otel",
}
#: Those that are worth having without the rest of their extra, which has torch or gRPC, and what pip calls them.
_ALONE = {"sklearn": "scikit-learn", "PIL": "pillow"}


def require(module: str, extra: str | None = None) -> ModuleType:
    """Import `module`, or raise UnavailableError (exit 6) with the command that installs it; `extra` of ours has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(missing(error, module, extra)) from error


def versions(*packages: str) -> dict[str, str]:
    """Of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def refuse_hidden() -> None:
    """Raise RefusedError where what Python finds as `export` or `runtime` is a user's own, which hides ours."""
    ours = Path(__file__).absolute().parents[1]
    for name in ("export", "runtime"):
        spec = importlib.util.find_spec(name)
        place = next(iter(spec.submodule_search_locations or [spec.origin or ""]), "") if spec else ""
        if place and ours not in Path(place).absolute().parents:
            raise RefusedError(
                f"{place}: is found as the package {name!r} and hides that of gmconv-deploy: rename it, or keep "
                f"its folder off Python's path (PYTHONPATH, the folder of the script that runs)"
            )


def missing(error: ImportError, module: str = "", extra: str | None = None) -> str:
    """What is missing, and the command that installs it; empty where it is no library of ours."""
    module = module or error.name or ""
    library = module.split(".")[0]
    extra = extra or EXTRAS.get(library)
    why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
    command = install(extra) if extra else ""
    if library in _ALONE:
        command = f"{pip(_ALONE[library])}, which the extra {extra} has too"
    return f"{module} {why}: {command}" if command else ""


def find_own(module: str, name: str, where: str) -> None:
    """Let a user's own `module:name` be found in the working directory too, behind everything else: it shadows nothing.

    Raises RefusedError for the name of a file where Python wants that of a module.
    """
    if module.endswith(".py") or "/" in module:
        meant = module.removesuffix(".py").strip("./").replace("/", ".")
        raise RefusedError(f"{where}: {module} is a file; name the module: {meant}:{name}")
    if (here := str(Path.cwd())) not in sys.path and not sys.flags.safe_path:
        sys.path.append(here)


def install(extra: str) -> str:
    """The command that adds `extra` (`export`, or `export,cpu`) to this installation."""
    if extra in ("export", "serve") and importlib.util.find_spec("onnxruntime") is None:
        extra += ",cpu"  # every export ends with a run in ONNX Runtime, and most servers are to run ONNX files
    return pip(*_requirement(f"[{extra}]"))


def pip(*arguments: str) -> str:
    """`pip install` of these into the environment that runs, by the tool that is there."""
    if importlib.util.find_spec("pip") is None:
        command = f"uv pip install --python {shlex.quote(sys.executable)}"
    elif os.environ.get("VIRTUAL_ENV") == sys.prefix:
        command = "pip install"
    else:
        command = f"{shlex.quote(sys.executable)} -m pip install"
    return " ".join([command, *(f"'{argument}'" if {*"[<>="} & {*argument} else argument for argument in arguments)])


def _requirement(extras: str) -> tuple[str, ...]:
    """This package with `extras`, from where it was installed: a folder, a wheel, a repository, or an index."""
    from importlib.metadata import Distribution, PackageNotFoundError

    try:
        record = Distribution.from_name(_DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:  # run from a checkout, not installed
        root = Path(__file__).parent.parent
        return (_shown(root) + extras if (root / "pyproject.toml").is_file() else _DISTRIBUTION + extras,)
    if record is None:
        return (_DISTRIBUTION + extras,)
    found = json.loads(record)
    url = str(found["url"])
    if url.startswith("file:") and "vcs_info" not in found:
        path = Path(unquote(urlsplit(url).path))
        if not path.exists():  # deleted since: what the extras consist of is on an index all the same
            return tuple(_parts(extras.strip("[]").split(",")))
        place = _shown(path) + extras
        return ("-e", place) if found.get("dir_info", {}).get("editable") else (place,)
    repository = f"{found['vcs_info']['vcs']}+" if "vcs_info" in found else ""
    return (f"{_DISTRIBUTION}{extras} @ {repository}{url}",)


def _parts(extras: list[str]) -> list[str]:
    """The requirements of `extras`, by the metadata of what is installed."""
    from importlib.metadata import requires

    found = []
    for line in requires(_DISTRIBUTION) or []:
        requirement, _, marker = line.partition(";")
        if any(f"extra == {quote}{extra}{quote}" in marker for extra in extras for quote in "'\""):
            own = requirement.strip().removeprefix(f"{_DISTRIBUTION}[")
            found += [requirement.strip()] if own == requirement.strip() else _parts(own.strip("]").split(","))
    return found


def _shown(path: Path) -> str:
    return "." if path == Path.cwd() else str(path)
