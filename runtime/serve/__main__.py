"""`python -m runtime.serve ARTEFACT|DIR`: the command line of the inference server."""

from __future__ import annotations

from gmconv.startup import prepare_process

if __name__ == "__main__":
    prepare_process()

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from gmconv.cli import Command, require
from runtime.serve.settings import Settings

MODULES = (
    "uvloop",
    "httptools",
    "h2",
    "prometheus_client",
    "tritonclient.grpc",
    "grpc_health.v1",
    "grpc_reflection.v1alpha",
)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each field of `Settings` that has a help text."""
    for field in reversed(fields(Settings)):
        if text := field.metadata.get("help"):
            name, is_flag = field.name.replace("_", "-"), isinstance(field.default, bool)
            command = click.option(
                f"--{name}/--no-{name}" if is_flag else f"--{name}",
                type=field.metadata["type"],
                default=field.default,
                envvar=field.metadata["variable"],
                show_default=not is_flag and "[default" not in text,
                help=text,
            )(command)
    return command


@click.command(cls=Command, example="gmconv serve net.onnx --model-name net")
@click.argument("source", metavar="ARTEFACT|DIR", type=click.Path(path_type=Path))
@_options
@click.option("--json", "as_json", is_flag=True, help="Print the listening and ready lines as JSON.")
def main(as_json: bool, **options: Any) -> None:
    """Serve ARTEFACT (model.onnx, model.plan) or a folder of them: Open Inference Protocol, REST and gRPC.

    A folder holds artefacts side by side, or is a Triton repository: NAME/1/model.onnx, with NAME/config.pbtxt or not.

    SIGTERM finishes what was sent, then exits 0. SIGHUP looks for new or changed artefacts and swaps them in; it also
    reads the token file and the certificate again.
    """
    for module in MODULES:
        require(module, "serve")
    from runtime.serve.server import run

    raise click.exceptions.Exit(run(make_settings(options), as_json=as_json))


def make_settings(options: dict[str, Any]) -> Settings:
    """Options, under the names of the command line, as Settings."""
    return Settings(**options)


if __name__ == "__main__":
    main()
