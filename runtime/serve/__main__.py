"""`python -m runtime.serve ARTEFACT|DIR`: the command line of the inference server."""

from __future__ import annotations

from gmconv.startup import prepare_process

if __name__ == "__main__":
    prepare_process()

import contextlib
import json
import os
import sys
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


@click.command(cls=Command, example="gmconv serve net.onnx --model-name net")
@click.argument("artefact", type=click.Path(path_type=Path))
@_options
@click.option(
    "--engine-cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Build an engine for this GPU of each .onnx file, and keep it there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the listening and ready lines as JSON.")
def main(**options: Any) -> None:
    """Serve ARTEFACT (model.onnx, model.plan) or a folder of them: Open Inference Protocol, REST and gRPC.

    SIGTERM finishes what was sent, then exits 0. SIGHUP looks for new or changed artefacts and swaps them in; it also
    reads the token file and the certificate again.
    """
    for module in MODULES:
        require(module, "serve")
    code = run(make_settings(options), as_json=options["as_json"])
    raise click.exceptions.Exit(code)


def make_settings(options: dict[str, Any]) -> Settings:
    """Options as Settings. Raises RefusedError."""
    from runtime.serve.auth import check_token, read_token

    if cache := options["engine_cache"]:
        from runtime.serve.models.engine_cache import prepare_engine

        own = {name: options[name] for name in ("device", "require_manifest")}
        options["prepare"] = partial(prepare_engine, cache_dir=cache, **own)
    given, token = os.environ.get(TOKEN_VARIABLE), None
    if options["token_file"]:
        token = read_token(options["token_file"])
    elif given is not None:  # an empty one is a mistake that would leave the door open
        token = check_token(given, TOKEN_VARIABLE)
    chosen = {field.name: options[field.name] for field in fields(Settings) if field.name in options}
    return Settings(source=options["artefact"], token=token, **chosen)


def run(settings: Settings, *, as_json: bool = False) -> int:
    """Serve until stopped; the exit code."""
    import asyncio
    import logging

    from runtime.serve.server import check, serve

    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("gmconv.serve").setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full or closed stderr is no reason to print about it there
    check(settings)
    # How long a thread may hold the interpreter while another waits: the default 5 ms is longer than an inference.
    sys.setswitchinterval(0.0001)

    def announce(event: dict[str, Any]) -> None:
        _say(json.dumps(event) if as_json else _sentence(event))

    try:
        import uvloop

        factory: Any = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        code = runner.run(serve(settings, announce))
    _say(None)
    return code


def _say(line: str | None) -> None:
    """Print, as long as there is somebody to print to; a closed or full stdout is no reason to stop serving."""
    try:
        if line is not None:
            print(line, flush=True)  # noqa: T201
        elif sys.stdout:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.close()  # with what could not be written, which the interpreter would try again at its end
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115


def _sentence(event: dict[str, Any]) -> str:
    if event["event"] == "ready":
        models = ", ".join(f"{name} (version {', '.join(versions)})" for name, versions in event["models"].items())
        return f"ready after {event['seconds']:.2f} s: {models}"
    scheme = "https" if event["tls"] else "http"
    host = f"[{event['host']}]" if ":" in event["host"] else event["host"]
    parts = []
    if "http_port" in event:
        parts.append(f"{scheme}://{host}:{event['http_port']}")
    if "grpc_port" in event:
        parts.append(f"gRPC {host}:{event['grpc_port']}")
    if "metrics_port" in event:
        parts.append(f"metrics http://{host}:{event['metrics_port']}/metrics")
    return "listening on " + ", ".join(parts)


if __name__ == "__main__":
    main()
