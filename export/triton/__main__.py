"""`python -m export.triton`: an artefact as one version of a model in a Triton Inference Server repository."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click

from export.triton.config import BACKEND_FILE, ServingOptions
from export.triton.write import write_repository
from gmconv.cli import Command, Whole, echo, print_json, progress_console, require, warn


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


@click.command(cls=Command, example="gmconv triton net.onnx -o repository/")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("-o", "--output", "repository", type=click.Path(path_type=Path), required=True, help="The repository.")
@click.option("--name", "--model-name", "name", help="Model name; the file's stem by default.")
@click.option("--version", type=Whole(1, 2**63 - 1), default=1, show_default=True, help="Version to write.")
@click.option("--max-batch", type=Whole(0, 2**31 - 1), help="max_batch_size; the profiles', or 32 for ONNX.")
@click.option("--instances", type=Whole(1, 1024), default=1, show_default=True, help="Copies per device.")
@click.option("--kind", type=click.Choice(["auto", "gpu", "cpu"]), default="auto", show_default=True)
@click.option("--gpus", callback=_gpus, help="Device numbers, such as 0,1; all of the server's by default.")
@click.option("--delay", type=Whole(0, 60_000_000), default=0, show_default=True, help="Queue delay, µs.")
@click.option("--max-queue", type=Whole(0, 2**31 - 1), default=0, show_default=True, help="0: no limit.")
@click.option("--queue-timeout", type=Whole(0, 2**40), default=0, show_default=True, help="µs; 0: none.")
@click.option("--policy", callback=_policy, default="latest:1", show_default=True, help="all, latest:N, specific:1,3.")
@click.option("--warmup/--no-warmup", default=True, show_default=True, help="Run the batch limits before ready.")
@click.option("--shape", "shapes", multiple=True, callback=_shapes, help="NAME=3x224x224: warm-up of dynamic axes.")
@click.option("--cuda-graphs", is_flag=True, help="TensorRT: capture CUDA graphs for batch 1 and the limit.")
@click.option("--threads", type=Whole(1, 4096), help="onnxruntime on a CPU: intra-op threads.")
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
    serving = ServingOptions(version_policy=policy, warmup_shapes=shapes, **options)
    entry = write_repository(artefact, repository, serving, name=name, version=version, force=force)
    warn(entry.warnings)
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
                "note": entry.note,
                "warnings": entry.warnings,
            }
        )
        return
    limit = entry.max_batch_size
    echo(f"{entry.version}: {entry.backend} backend, {f'batches up to {limit}' if limit else 'requests run alone'}")
    folder = shlex.quote(str(repository))
    serve = f"serve it: tritonserver --model-repository={folder} (or gmconv serve {folder})"
    console.print(serve, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
