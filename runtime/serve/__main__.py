"""`python -m runtime.serve ARTEFACT|DIR`: the command line of the inference server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from gmconv.cli import Command, require
from runtime.serve.settings import MIB, Settings

DEFAULT = Settings(source=Path())
PORT = click.IntRange(0, 65535)
FILE = click.Path(path_type=Path, dir_okay=False)
TOKEN_VARIABLE = "GMCONV_SERVE_TOKEN"


@click.command(cls=Command, example="gmconv serve net.onnx --model-name net")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--model-name", help="Name it is served under [default: the file's or folder's].")
@click.option("--host", default=DEFAULT.host, show_default=True, help="Address to listen on.")
@click.option(
    "--http-port", type=PORT, default=8000, show_default=True, help="REST; 0 takes a free port and prints it."
)
@click.option("--grpc-port", type=PORT, default=8001, show_default=True, help="gRPC; 0 takes a free port.")
@click.option("--metrics-port", type=PORT, default=8002, show_default=True, help="Prometheus; 0 takes a free port.")
@click.option("--http/--no-http", default=True, help="Serve REST.")
@click.option("--grpc/--no-grpc", default=True, help="Serve gRPC.")
@click.option("--metrics/--no-metrics", default=True, help="Serve metrics.")
@click.option("--device", default=DEFAULT.device, show_default=True, help="cpu, cuda, cuda:N; auto: cuda for engines.")
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="CPU threads per instance [default: cores/instances]."
)
@click.option("--instances", type=click.IntRange(1, 64), default=1, show_default=True, help="Engines per model.")
@click.option(
    "--solo-threads",
    type=click.IntRange(0),
    help="CPU threads of one more engine, for a request that is alone; 0: none "
    "[default: those of all instances, if there are several].",
)
@click.option("--spinning/--no-spinning", default=False, help="Let idle ONNX Runtime threads spin for long.")
@click.option(
    "--max-batch",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    help="Rows per execution, where no profile says.",
)
@click.option(
    "--max-queue-delay",
    type=click.FloatRange(0, 10),
    default=0.0,
    show_default=True,
    help="Seconds to wait for a fuller batch.",
)
@click.option(
    "--queue-size",
    type=click.IntRange(1),
    default=DEFAULT.queue_size,
    show_default=True,
    help="Requests that may wait per model.",
)
@click.option(
    "--queue-timeout",
    type=click.FloatRange(0),
    default=DEFAULT.queue_timeout,
    show_default=True,
    help="Seconds a request may wait; 0 for ever.",
)
@click.option(
    "--burst-window",
    type=click.FloatRange(0, min_open=True),
    default=DEFAULT.burst_window,
    show_default=True,
    help="Seconds of work that may pile up, and stay, before it counts as overload.",
)
@click.option(
    "--shed-target",
    type=click.FloatRange(0, min_open=True),
    default=DEFAULT.shed_target,
    show_default=True,
    help="Under overload, seconds of work that may wait (at least three executions); the rest gets 503.",
)
@click.option(
    "--priority-levels",
    type=click.IntRange(0, 100),
    default=0,
    show_default=True,
    help="Levels of the priority parameter.",
)
@click.option(
    "--max-request-mib", type=click.IntRange(1, 1024), default=64, show_default=True, help="Largest request body."
)
@click.option(
    "--max-inflight-mib", type=click.IntRange(1), default=512, show_default=True, help="Request bytes held at once."
)
@click.option(
    "--header-timeout",
    type=click.FloatRange(0.1),
    default=DEFAULT.header_timeout,
    show_default=True,
    help="Seconds for a request's header to arrive.",
)
@click.option(
    "--body-timeout",
    type=click.FloatRange(0.1),
    default=DEFAULT.body_timeout,
    show_default=True,
    help="Seconds for a request's body to arrive.",
)
@click.option("--max-connections", type=click.IntRange(1), default=DEFAULT.max_connections, show_default=True)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0),
    default=DEFAULT.drain_timeout,
    show_default=True,
    help="Seconds to finish requests on SIGTERM.",
)
@click.option("--require-manifest/--no-require-manifest", default=True, help="Refuse artefacts without a manifest.")
@click.option("--access-log/--no-access-log", default=True, help="One JSON line per request on stderr.")
@click.option("--otel", type=click.Choice(["console", "otlp"]), help="Export OpenTelemetry spans.")
@click.option("--token-file", type=FILE, help=f"Ask for this bearer token [or variable {TOKEN_VARIABLE}].")
@click.option("--tls-cert", type=FILE, help="PEM certificate chain for REST and gRPC.")
@click.option("--tls-key", type=FILE, help="PEM private key.")
@click.option(
    "--engine-cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Build and cache an engine for this GPU from ARTEFACT (.onnx).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the listening and ready lines as JSON.")
def main(**options: Any) -> None:
    """Serve ARTEFACT (model.onnx, model.plan) or a folder of them: Open Inference Protocol, REST and gRPC.

    SIGTERM finishes what was sent, then exits 0. SIGHUP looks for new or changed artefacts and swaps them in.
    """
    for module in ("uvicorn", "starlette", "prometheus_client", "tritonclient.grpc"):
        require(module, "serve")
    code = run(make_settings(options), as_json=options["as_json"])
    raise click.exceptions.Exit(code)


def make_settings(options: dict[str, Any]) -> Settings:
    """Options as Settings; prepares the engine where a cache is given. Raises RefusedError, UnavailableError."""
    from runtime.serve.auth import read_token

    source: Path = options["artefact"]
    if cache := options["engine_cache"]:
        if source.suffix != ".onnx":
            raise click.UsageError("--engine-cache goes with an .onnx file: it builds the engine from it")
        from runtime.serve.engine_cache import prepare_engine

        options["model_name"] = options["model_name"] or source.stem
        source = prepare_engine(source, cache, device=options["device"], require_manifest=options["require_manifest"])
    token = read_token(options["token_file"]) if options["token_file"] else os.environ.get(TOKEN_VARIABLE) or None
    plain = set(Settings.__dataclass_fields__) & set(options)
    return Settings(
        source=source,
        token=token,
        max_request_bytes=options["max_request_mib"] * MIB,
        max_inflight_bytes=max(options["max_inflight_mib"], options["max_request_mib"]) * MIB,
        **{name: options[name] for name in plain},
    )


def run(settings: Settings, *, as_json: bool = False) -> int:
    """Serve until stopped; the exit code."""
    import asyncio
    import logging
    import sys

    from runtime.serve.server import check, serve

    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("gmconv.serve").setLevel(logging.INFO)
    check(settings)
    # How long a thread may hold the interpreter while another waits: the default 5 ms is longer than an inference.
    sys.setswitchinterval(0.0001)

    def announce(event: dict[str, Any]) -> None:
        click.echo(json.dumps(event) if as_json else _sentence(event))
        sys.stdout.flush()

    try:
        import uvloop

        factory: Any = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(serve(settings, announce))


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
