"""Every REST route but inference: health, metadata, configuration, statistics, settings, classify, the page."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from runtime.serve import protocol
from runtime.serve.body import read_body
from runtime.serve.classify import classify_image
from runtime.serve.errors import Code, RequestError
from runtime.serve.models import ModelVersion
from runtime.serve.openapi import document
from runtime.serve.service import Service

Handler = Callable[[Request], Awaitable[Response]]
PAGE = Path(__file__).parent / "page"
MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
CSP = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SETTINGS_BYTES = 64 * 1024


def make_router(service: Service) -> Router:
    """The router. Its own 404 and 405 are in Triton's form; other errors are RequestErrors for `App` to render."""
    rest = Rest(service)
    routes: list[Route] = []

    def add(path: str, get: Handler | None = None, post: Handler | None = None) -> None:
        async def endpoint(request: Request) -> Response:
            handler = post if request.method == "POST" else get
            assert handler is not None
            response = await handler(request)
            response.headers["x-request-id"] = request.scope["gmconv.request_id"]
            if service.draining:
                response.headers["connection"] = "close"
            request.scope["gmconv.entry"]["status"] = response.status_code
            return response

        methods = [m for m, h in (("GET", get), ("POST", post)) if h]
        routes.append(Route(path, endpoint, methods=methods))

    add("/v2", rest.server)
    add("/v2/health/live", rest.live)
    add("/v2/health/ready", rest.ready)
    add("/v2/models/stats", rest.all_statistics)
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        add(model, rest.metadata)
        add(f"{model}/ready", rest.model_ready)
        add(f"{model}/config", rest.config)
        add(f"{model}/stats", rest.statistics)
        add(f"{model}/manifest", rest.manifest)
        add(f"{model}/classify", post=rest.classify)
    add("/v2/models/{model}/trace/setting", rest.trace, rest.update_trace)
    add("/v2/models", rest.models)
    add("/v2/trace/setting", rest.trace, rest.update_trace)
    add("/v2/logging", rest.logging, rest.update_logging)
    add("/openapi.json", rest.openapi)
    for url, name in (("/", "index.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        add(url, rest.page(name))
    known = {route.path: sorted(route.methods or ()) for route in routes}

    async def not_found(scope: Any, receive: Any, send: Any) -> None:
        raise RequestError("Not Found", Code.NOT_FOUND)

    routes.extend(Route(path, _method_not_allowed(methods, service), methods=None) for path, methods in known.items())
    return Router(routes, redirect_slashes=False, default=not_found)


class _AnyMethod:
    """An ASGI endpoint: Starlette routes every method to one that is not a function."""

    def __init__(self, allowed: list[str], service: Service) -> None:
        self._allowed, self._service = allowed, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["gmconv.entry"]["status"] = 405
        response = JSONResponse({"error": "Method Not Allowed"}, 405, {"allow": ", ".join(self._allowed)})
        response.headers["x-request-id"] = scope["gmconv.request_id"]
        await response(scope, receive, send)


def _method_not_allowed(allowed: list[str], service: Service) -> Any:
    return _AnyMethod(allowed, service)


class Rest:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._page = {p.name: p.read_bytes() for p in PAGE.iterdir() if p.suffix in MEDIA}
        self._openapi = json.dumps(document(service.settings)).encode()

    def _model(self, request: Request) -> ModelVersion:
        return self.service.repository.get(request.path_params["model"], request.path_params.get("version", ""))

    async def live(self, request: Request) -> Response:
        """The process answers."""
        return Response()

    async def ready(self, request: Request) -> Response:
        """All models are loaded and warmed up, no engine failed, the server is not stopping."""
        if not self.service.ready:
            raise RequestError("the server is not ready", Code.UNAVAILABLE)
        return Response()

    async def server(self, request: Request) -> Response:
        """Server metadata."""
        return JSONResponse(protocol.to_dict(protocol.server_metadata()))

    async def models(self, request: Request) -> Response:
        """Names and versions (not part of the protocol; the page needs it)."""
        repository = self.service.repository
        names = sorted({m.source.name for m in repository.all()})
        return JSONResponse({"models": [{"name": n, "versions": repository.versions(n)} for n in names]})

    async def metadata(self, request: Request) -> Response:
        """Model metadata."""
        return JSONResponse(protocol.to_dict(protocol.model_metadata(self._model(request), self.service.repository)))

    async def model_ready(self, request: Request) -> Response:
        """Ready when loaded (only warmed-up models are), and the server is."""
        self._model(request)
        return await self.ready(request)

    async def config(self, request: Request) -> Response:
        """The model's configuration as Triton would show it."""
        return JSONResponse(protocol.to_dict(protocol.model_config(self._model(request), self.service.repository)))

    async def statistics(self, request: Request) -> Response:
        """Counters of one version, or of all versions when none is named."""
        model = self._model(request)
        repository = self.service.repository
        chosen = (
            [model]
            if "version" in request.path_params
            else [repository.get(model.source.name, v) for v in repository.versions(model.source.name)]
        )
        return JSONResponse(protocol.to_dict(protocol.statistics(chosen)))

    async def all_statistics(self, request: Request) -> Response:
        """Counters of every model."""
        return JSONResponse(protocol.to_dict(protocol.statistics(self.service.repository.all())))

    async def manifest(self, request: Request) -> Response:
        """The model card: the artefact's manifest (not part of the protocol)."""
        manifest = self._model(request).manifest
        if manifest is None:
            raise RequestError("this model came without a manifest", Code.NOT_FOUND)
        return Response(msgspec.json.encode(manifest), media_type="application/json")

    async def classify(self, request: Request) -> Response:
        """An image file in the body, labels and probabilities out."""
        model = self._model(request)
        entry = request.scope["gmconv.entry"]
        model.users += 1
        try:
            return JSONResponse(await classify_image(self.service, model, request, entry))
        finally:
            model.users -= 1

    async def logging(self, request: Request) -> Response:
        """Log settings."""
        return JSONResponse(self.service.log_settings.values)

    async def update_logging(self, request: Request) -> Response:
        """Change log settings."""
        self.service.log_settings.update(await self._json_object(request))
        return JSONResponse(self.service.log_settings.values)

    async def trace(self, request: Request) -> Response:
        """Trace settings."""
        if "model" in request.path_params:
            self._model(request)
        settings = protocol.trace_settings(self.service.tracer is not None)
        return JSONResponse({k: list(v) if k == "trace_level" else v[0] for k, v in settings.items()})

    async def update_trace(self, request: Request) -> Response:
        """Trace settings are chosen at start; what is already so is accepted."""
        protocol.check_trace_update(await self._json_object(request), self.service.tracer is not None)
        return await self.trace(request)

    async def openapi(self, request: Request) -> Response:
        """This API, described."""
        return Response(self._openapi, media_type="application/json")

    def page(self, name: str) -> Handler:
        """A handler for one of the page's files."""

        async def answer(request: Request) -> Response:
            response = Response(self._page[name], media_type=MEDIA[Path(name).suffix])
            response.headers["content-security-policy"] = CSP.decode()
            response.headers["x-content-type-options"] = "nosniff"
            response.headers["referrer-policy"] = "no-referrer"
            response.headers["cache-control"] = "no-cache"
            return response

        return answer

    async def _json_object(self, request: Request) -> dict[str, Any]:
        headers = {k: v for k, v in request.scope["headers"] if k == b"content-length"}
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > SETTINGS_BYTES:
            raise RequestError("the settings are too large", Code.TOO_LARGE)
        body, reserved = await read_body(self.service, headers, request.receive, 0)
        self.service.inflight_bytes -= reserved
        if len(body) > SETTINGS_BYTES:
            raise RequestError("the settings are too large", Code.TOO_LARGE)
        try:
            return msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
            raise RequestError("the body must be a JSON object of settings") from None
