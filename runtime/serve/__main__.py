"""`python -m runtime.serve ARTEFACT|DIR`: the command line of the inference server."""

from __future__ import annotations

from gmconv import startup

if __name__ == "__main__":
    startup.prepare()

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from gmconv.cli import Command, require
from runtime.serve.settings import MIB, Settings

Handler = TypeVar("Handler", bound=Callable[..., Any])
DEFAULT = Settings(source=Path())
PORT = click.IntRange(0, 65535)
FILE = click.Path(path_type=Path, dir_okay=False)
TOKEN_VARIABLE = "GMCONV_SERVE_TOKEN"
DAY = 86_400.0
MODULES = ("httptools", "h2", "prometheus_client", "tritonclient.grpc", "grpc_health.v1", "grpc_reflection.v1alpha")


def _setting(name: str, kind: Any, text: str) -> Callable[[Handler], Handler]:
    """An option for the field of `Settings` of that name, with its default."""
    default = getattr(DEFAULT, name)
    return click.option(f"--{name.replace('_', '-')}", type=kind, default=default, show_default=True, help=text)


def _seconds(low: float = 0.0, *, least_open: bool = False) -> click.FloatRange:
    """A time of at most a day; a limit that is infinite or not a number limits nothing."""
    return _Finite(low, DAY, min_open=least_open)


class _Finite(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As FloatRange, without NaN, which compares with nothing."""
        number = float(super().convert(value, param, ctx))
        if number != number:
            self.fail(f"{value} is not a number", param, ctx)
        return number


@click.command(cls=Command, example="gmconv serve net.onnx --model-name net")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option("--model-name", help="Name it is served under [default: the file's or folder's].")
@_setting("host", str, "Address to listen on.")
@_setting("http_port", PORT, "REST; 0 takes a free port and prints it.")
@_setting("grpc_port", PORT, "gRPC; 0 takes a free port.")
@_setting("metrics_port", PORT, "Prometheus, without token or TLS; 0 takes a free port.")
@click.option("--http/--no-http", default=True, help="Serve REST.")
@click.option("--grpc/--no-grpc", default=True, help="Serve gRPC.")
@click.option("--metrics/--no-metrics", default=True, help="Serve metrics.")
@_setting("device", str, "cpu, cuda, cuda:N; auto: cuda for engines.")
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="CPU threads per instance [default: cores/instances]."
)
@_setting("instances", click.IntRange(1, 64), "Engines per model.")
@click.option(
    "--solo-threads",
    type=click.IntRange(0),
    help="CPU threads of one more engine, for a request that is alone; 0: none "
    "[default: those of all instances, if there are several].",
)
@click.option("--spinning/--no-spinning", default=False, help="Let idle ONNX Runtime threads spin for long.")
@_setting("max_batch", click.IntRange(1, 4096), "Rows per execution, where no profile says.")
@_setting("max_queue_delay", _Finite(0, 10), "Seconds to wait for a fuller batch.")
@_setting("queue_size", click.IntRange(1, 1 << 20), "Requests that may wait per model.")
@_setting("queue_timeout", _seconds(), "Seconds a request may wait; 0 for ever.")
@_setting("burst_window", _seconds(least_open=True), "Seconds of work that may pile up before it counts as overload.")
@_setting(
    "shed_target",
    _seconds(least_open=True),
    "Under overload, seconds of work that may wait (at least three executions); the rest gets 503.",
)
@_setting("priority_levels", click.IntRange(0, 100), "Levels of the priority parameter.")
@click.option(
    "--max-request-mib", type=click.IntRange(1, 1024), default=64, show_default=True, help="Largest request body."
)
@click.option(
    "--max-inflight-mib",
    type=click.IntRange(1, 1 << 20),
    default=512,
    show_default=True,
    help="Bytes of requests and answers held at once.",
)
@_setting("header_timeout", _seconds(0.1), "Seconds for a TLS handshake and a request's header to arrive.")
@_setting("body_timeout", _seconds(0.1), "Seconds for a request's body to arrive, and for its answer to be taken.")
@_setting("keep_alive", _seconds(0.1), "Seconds that an idle connection is kept.")
@_setting("max_connection_age", _seconds(), "Seconds after which a client is told to connect anew; 0: never.")
@_setting("max_connections", click.IntRange(1, 1 << 20), "Connections per port; some more are kept for probes.")
@_setting("drain_timeout", _seconds(), "Seconds to finish requests on SIGTERM; the process ends 2 s later at most.")
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

    SIGTERM finishes what was sent, then exits 0. SIGHUP looks for new or changed artefacts and swaps them in; it also
    reads the token file and the certificate again.
    """
    for module in MODULES:
        require(module, "serve")
    code = run(make_settings(options), as_json=options["as_json"])
    raise click.exceptions.Exit(code)


def make_settings(options: dict[str, Any]) -> Settings:
    """Options as Settings; prepares the engine where a cache is given. Raises RefusedError, UnavailableError."""
    from runtime.serve.auth import check_token, read_token

    source: Path = options["artefact"]
    if cache := options["engine_cache"]:
        if source.suffix != ".onnx":
            raise click.UsageError("--engine-cache goes with an .onnx file: it builds the engine from it")
        from runtime.serve.models.engine_cache import prepare_engine

        options["model_name"] = options["model_name"] or source.stem
        source = prepare_engine(source, cache, device=options["device"], require_manifest=options["require_manifest"])
    given, token = os.environ.get(TOKEN_VARIABLE), None
    if options["token_file"]:
        token = read_token(options["token_file"])
    elif given:
        token = check_token(given, TOKEN_VARIABLE)
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
