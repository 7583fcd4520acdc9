"""`python -m runtime.serve ARTEFACT|DIR`: the command line of the inference server."""

from __future__ import annotations

from gmconv.startup import prepare_process

if __name__ == "__main__":
    prepare_process()

import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from gmconv.cli import Command, require
from runtime.serve.settings import TOKEN_VARIABLE, Settings

MODULES = ("httptools", "h2", "prometheus_client", "tritonclient.grpc", "grpc_health.v1", "grpc_reflection.v1alpha")


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each field of `Settings` that has a help text."""
    for field in reversed(fields(Settings)):
        if text := field.metadata.get("help"):
            name, is_flag = field.name.replace("_", "-"), isinstance(field.default, bool)
            command = click.option(
                f"--{name}/--no-{name}" if is_flag else f"--{name}",
                type=field.metadata["type"],
                default=field.default,
                show_default=not is_flag and "[default" not in text,
                help=text,
            )(command)
    return command


def _profile(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """ "1,8,32" as numbers."""
    if not text:
        return None
    sizes = tuple(int(part) for part in text.split(",") if part.strip().isdecimal())
    if len(sizes) != 3 or text.count(",") != 2 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise click.BadParameter(f"{text!r}: write smallest, tuned and largest batch, such as 1,8,32")
    return sizes


@click.command(cls=Command, example="gmconv serve net.onnx --model-name net")
@click.argument("artefact", type=click.Path(path_type=Path))
@_options
@click.option(
    "--engine",
    type=click.Choice(("cpu", "gpu", "tensorrt", "rtx")),
    envvar="GMCONV_ENGINE",
    help="Run ONNX files by ONNX Runtime (cpu, gpu), or by an engine that is built at the start.",
)
@click.option(
    "--engine-cache",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="GMCONV_ENGINE_CACHE",
    help="Build an engine for this GPU of each .onnx file, and keep it there.",
)
@click.option(
    "--engine-batch",
    metavar="MIN,OPT,MAX",
    envvar="GMCONV_ENGINE_BATCH",
    callback=_profile,
    help="Smallest, tuned and largest batch of engines that are built.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the listening and ready lines as JSON.")
def main(**options: Any) -> None:
    """Serve ARTEFACT (model.onnx, model.plan) or a folder of them: Open Inference Protocol, REST and gRPC.

    SIGTERM finishes what was sent, then exits 0. SIGHUP looks for new or changed artefacts and swaps them in; it also
    reads the token file and the certificate again.
    """
    for module in MODULES:
        require(module, "serve")
    from runtime.serve.server import run

    raise click.exceptions.Exit(run(make_settings(options), as_json=options["as_json"]))


def make_settings(options: dict[str, Any]) -> Settings:
    """Options as Settings. Raises RefusedError, UsageError."""
    from runtime.serve.auth import check_token, read_token

    engine, cache = options["engine"], options["engine_cache"]
    if engine in ("tensorrt", "rtx") and not cache:
        raise click.UsageError(f"--engine {engine}: say where engines are kept, by --engine-cache")
    if engine not in (None, "cpu") and options["device"] == "auto":
        options["device"] = "cuda"
    if cache and engine not in ("cpu", "gpu"):
        from runtime.serve.models.engine_cache import prepare_engine

        own = {name: options[name] for name in ("device", "require_manifest")}
        chosen = {"flavor": engine or "auto", "profile": options["engine_batch"], **own}
        options["prepare"] = partial(prepare_engine, cache_dir=cache, **chosen)
    given, token = os.environ.get(TOKEN_VARIABLE), None
    if options["token_file"]:
        token = read_token(options["token_file"])
    elif given is not None:  # an empty one is a mistake that would leave the door open
        token = check_token(given, TOKEN_VARIABLE)
    known = {field.name: options[field.name] for field in fields(Settings) if field.name in options}
    return Settings(source=options["artefact"], token=token, **known)


if __name__ == "__main__":
    main()
