"""`python -m export.triton`: an artefact as one version of a model in a Triton Inference Server repository.

Writes `<repository>/<name>/config.pbtxt` and `<repository>/<name>/<version>/model.onnx` (backend "onnxruntime") or
`model.plan` (backend "tensorrt"). The configuration is built, written and read back through Triton's own protobuf
message, and compared with the artefact, so it does not depend on the server's auto-completion (which would cap ONNX
models at batch 4). Fields: docs/user_guide/model_configuration.md of github.com/triton-inference-server/server.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click

from export.triton_config import BACKEND_FILE, ServingOptions, batching_note, check_config, model_config, to_text
from export.triton_interface import Interface, interface_of
from export.triton_repository import place_version
from runtime.cli import Command, print_json, progress_console, require
from runtime.errors import Interrupted, RefusedError
from runtime.manifest import find_manifest

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryEntry:
    """What `write_repository` wrote: the model's folder, the version's folder and the served batch limit.

    `note` says, where there is something to say, why Triton batches less than the artefact seems to offer.
    """

    model: Path
    version: Path
    config: Path
    name: str
    backend: str
    max_batch_size: int
    note: str | None = None


def write_repository(
    artefact: Path,
    repository: Path,
    options: ServingOptions | None = None,
    *,
    name: str | None = None,
    version: int = 1,
    force: bool = False,
) -> RepositoryEntry:
    """Place `artefact` (an ONNX file or an engine) into the Triton repository `repository` as `name`/`version`.

    A server that reads the repository meanwhile, or after this was killed, finds what was there before or the new
    model, whole; what is there already is refused unless `force`. With several versions the one config.pbtxt of a model
    must fit them all, which is checked even under `force`.

    Raises RefusedError when the artefact, its manifest or the name is refused, the engine cannot be loaded by Triton
    (TensorRT-RTX), the options do not fit the artefact, the repository holds something else under that name, or another
    run is writing that model.
    """
    options = options or ServingOptions()
    name = artefact.stem if name is None else name
    if not _NAME.fullmatch(name):
        raise RefusedError(f"model name {name[:80]!r}: Triton takes letters, digits, '_', '-' and '.'; give --name")
    if version < 1:
        raise RefusedError(f"version {version}: Triton's versions are whole numbers from 1")
    manifest = find_manifest(artefact)
    interface = interface_of(artefact, manifest)
    config = model_config(name, interface, options)
    check_config(config, interface)
    model = place_version(artefact, manifest, interface, config, repository, version=version, force=force)
    return RepositoryEntry(
        model=model,
        version=model / str(version),
        config=model / "config.pbtxt",
        name=name,
        backend=interface.backend,
        max_batch_size=config.max_batch_size,
        note=batching_note(interface, config.max_batch_size) if options.max_batch is None else None,
    )


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM as Interrupted, so that what is staged is removed on the way out."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted("stopped by SIGTERM before it was done; run it again")

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse_shape(value: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(?P<name>.+?)[=:](?P<dims>\d{1,9}(?:[x,]\d{1,9})*)", value)
    dims = tuple(int(d) for d in re.split("[x,]", match["dims"])) if match else ()
    if match is None or not all(dims):
        raise click.BadParameter(f"{value!r}: write NAME=3x224x224, a shape without the axis Triton batches")
    return match["name"], dims


def _shapes(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    return dict(_parse_shape(value) for value in values)


def _policy(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"all|latest:[1-9]\d{0,8}|specific:[1-9]\d{0,17}(,[1-9]\d{0,17})*", value):
        raise click.BadParameter(f"{value!r}: write all, latest:N or specific:1,3")
    return value


def _gpus(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", value):
        raise click.BadParameter(f"{value!r}: write device numbers, such as 0 or 0,1")
    return tuple(int(v) for v in value.split(","))


@click.command(cls=Command)
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("-o", "--output", "repository", type=click.Path(path_type=Path), required=True, help="The repository.")
@click.option("--name", help="Model name; the file's stem by default.")
@click.option("--version", type=click.IntRange(1, 2**63 - 1), default=1, show_default=True, help="Version to write.")
@click.option("--max-batch", type=click.IntRange(0, 2**31 - 1), help="max_batch_size; the profiles', or 32 for ONNX.")
@click.option("--instances", type=click.IntRange(1, 1024), default=1, show_default=True, help="Copies per device.")
@click.option("--kind", type=click.Choice(["auto", "gpu", "cpu"]), default="auto", show_default=True)
@click.option("--gpus", callback=_gpus, help="Device numbers, such as 0,1; all of the server's by default.")
@click.option("--delay", type=click.IntRange(0, 60_000_000), default=0, show_default=True, help="Queue delay, µs.")
@click.option("--max-queue", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="0: no limit.")
@click.option("--queue-timeout", type=click.IntRange(0, 2**40), default=0, show_default=True, help="µs; 0: none.")
@click.option("--policy", callback=_policy, default="latest:1", show_default=True, help="all, latest:N, specific:1,3.")
@click.option("--warmup/--no-warmup", default=True, show_default=True, help="Run the batch limits before ready.")
@click.option("--shape", "shapes", multiple=True, callback=_shapes, help="NAME=3x224x224: warm-up of dynamic axes.")
@click.option("--cuda-graphs", is_flag=True, help="TensorRT: capture CUDA graphs for batch 1 and the limit.")
@click.option("--threads", type=click.IntRange(1, 4096), help="onnxruntime on a CPU: intra-op threads.")
@click.option("--force", is_flag=True, help="Replace an existing version, config.pbtxt and labels.txt.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(
    artefact: Path,
    repository: Path,
    name: str | None,
    version: int,
    policy: str,
    shapes: dict[str, tuple[int, ...]],
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write ARTEFACT (model.onnx or model.plan) into a Triton model repository."""
    require("tritonclient.grpc", "serve")
    with _stoppable():
        entry = write_repository(
            artefact,
            repository,
            ServingOptions(version_policy=policy, warmup_shapes=shapes, **options),
            name=name,
            version=version,
            force=force,
        )
    console = progress_console()
    if entry.note:
        console.print(f"note: {entry.note}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(
            {
                "repository": str(repository),
                "name": entry.name,
                "version": version,
                "backend": entry.backend,
                "max_batch_size": entry.max_batch_size,
                "config": str(entry.config),
                "model": str(entry.version / BACKEND_FILE[entry.backend]),
            }
        )
        return
    limit = entry.max_batch_size
    click.echo(
        f"{entry.version}: {entry.backend} backend, {f'batches up to {limit}' if limit else 'requests run alone'}"
    )
    serve = f"serve it: tritonserver --model-repository={repository}"
    console.print(serve, markup=False, highlight=False, soft_wrap=True)


__all__ = [
    "Interface",
    "RepositoryEntry",
    "ServingOptions",
    "check_config",
    "model_config",
    "to_text",
    "write_repository",
]

if __name__ == "__main__":
    main()
