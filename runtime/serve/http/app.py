"""The REST side: which handler a request is for, whether it may go on, and every handler but classify's."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from runtime.manifest import Manifest
from runtime.serve.errors import Code, RequestError, too_large
from runtime.serve.http.body import encode_body, inflate_body
from runtime.serve.http.classify import classify_image
from runtime.serve.http.messages import JSON, Answer, Headers, Request, error_answer, json_answer
from runtime.serve.models.version import ModelVersion
from runtime.serve.observe.metrics import Exposition
from runtime.serve.protocol import codec, documents
from runtime.serve.service import Service

Handler = Callable[[Request], Awaitable[Answer]]
OCTETS = (b"content-type", b"application/octet-stream")
PAGE = Path(__file__).parent / "page"
OPENAPI = Path(__file__).with_name("openapi.json")
MEDIA = {".html": b"text/html", ".css": b"text/css", ".js": b"text/javascript"}
PAGE_HEADERS: Headers = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]
PROBES = frozenset(("/v2/health/live", "/v2/health/ready"))
OPEN_PATHS = PROBES | {"/", "/page.css", "/page.js"}
"""Answered without a token: probes, and the page's own files, which hold nothing of the models."""
OF_MODEL = re.compile(r"/v2/models/(?P<name>[^/]+)(/versions/(?P<version>[^/]+))?(/(?P<verb>\w+))?")
SMALL_BODY = 64 * 1024
OFF_LOOP = 64 * 1024
"""Bytes of JSON from which on they are read and written beside the event loop."""


class App:
    """The application: `admit` looks at a head, `answer` runs the handler. Both turn nothing but errors away."""

    def __init__(self, service: Service) -> None:
        self.service = service
        repository = service.repository
        statistics = _document(lambda request: documents.statistics(repository.select(*request.target)))
        described = documents.openapi(OPENAPI.read_bytes(), secured=not service.gate.open)
        page = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
        self._fixed: dict[str, dict[str, Handler]] = {
            "/v2": {"GET": _document(lambda request: documents.SERVER)},
            "/v2/health/live": {"GET": _document(lambda request: {"live": True})},
            "/v2/health/ready": {"GET": _document(self._ready)},
            "/v2/models": {"GET": _document(self._names)},
            "/v2/models/stats": {"GET": statistics},
            "/v2/repository/index": {"POST": _document(self._index)},
            "/v2/logging": dict.fromkeys(("GET", "POST"), _document(self._logging)),
            "/openapi.json": {"GET": _file(described, [JSON])},
            **{path: {"GET": _page_file(PAGE / name)} for path, name in page.items()},
        }
        self._of_model: dict[str, dict[str, Handler]] = {
            "": {"GET": _document(lambda request: documents.model_metadata(self._model(request), repository))},
            "ready": {"GET": _document(self._ready)},
            "config": {"GET": _document(lambda request: documents.model_config(self._model(request)))},
            "stats": {"GET": statistics},
            "manifest": {"GET": _document(self._manifest)},
            "infer": {"POST": self.infer},
            "classify": {"POST": self.classify},
        }
        self._limits: dict[Handler, int] = {
            self.infer: service.settings.max_request_bytes,
            self.classify: service.settings.max_image_bytes,
        }

    def admit(self, request: Request, *, crowded: bool, declared: int) -> None:
        """Choose the handler, or raise RequestError: without a token, a model, a place in its queue, or too large."""
        headers = request.headers
        if request.path not in OPEN_PATHS:
            self.service.admit(headers.get(b"authorization"))
        if crowded and request.path not in PROBES:
            self.service.refusals["http", "too many connections"] += 1
            request.keep_alive = False
            raise RequestError("too many connections", Code.OVERLOADED)
        methods = self._find(request)
        method = "GET" if request.method == "HEAD" else request.method
        handler = methods.get(method)
        if handler is None:
            raise RequestError("Method Not Allowed", Code.METHOD, allow=", ".join(methods))
        request.handler = handler
        request.limit = self._limits.get(handler, SMALL_BODY)
        if handler in self._limits:
            model = request.call.use(self.service.repository.get(*request.target))
            if handler == self.infer:
                request.header_length = header_size(headers.get(b"inference-header-content-length"))
            elif why := model.takes_no_images:
                raise RequestError(why)
        if declared > request.limit:
            raise too_large(request.limit)

    def _find(self, request: Request) -> dict[str, Handler]:
        if methods := self._fixed.get(request.path):
            return methods
        found = OF_MODEL.fullmatch(request.path)
        if found and (methods := self._of_model.get(found["verb"] or "")):
            request.target = unquote(found["name"]), unquote(found["version"] or "")
            return methods
        raise RequestError("Not Found", Code.NOT_FOUND)

    async def answer(self, request: Request) -> Answer:
        """Run the handler; an error becomes an answer."""
        assert request.handler is not None
        try:
            return await request.handler(request)
        except Exception as error:
            request.drop()
            return error_answer(request.call, error)

    def _model(self, request: Request) -> ModelVersion:
        return self.service.repository.get(*request.target)

    async def infer(self, request: Request) -> Answer:
        """One inference."""
        service, call = self.service, request.call
        model = call.model
        assert model is not None
        body = request.body()
        if (encoding := request.headers.get(b"content-encoding")) is not None:
            body = await inflate_body(service, call, encoding, body)
        large = (len(body) if request.header_length is None else request.header_length) > OFF_LOOP
        decoded = await service.work(large, codec.decode, body, request.header_length, model.signature)
        del body
        if large:
            call.release()
            call.take(sum(array.nbytes for array in decoded.feeds.values()))
        outputs, item = await service.infer(call, decoded, request.client)
        answer = (model.source.name, model.source.version, decoded, outputs, model.signature)
        large = decoded.json_elements(outputs) > OFF_LOOP // 16
        content, json_length = await service.work(large, codec.encode, *answer)
        headers = [JSON] if json_length is None else [OCTETS, (b"inference-header-content-length", b"%d" % json_length)]
        if accepted := request.headers.get(b"accept-encoding"):
            content = await encode_body(service, accepted, content, headers)
        call.succeeded(item)
        return Answer(content, headers)

    async def classify(self, request: Request) -> Answer:
        """An image file in the body, labels and probabilities out."""
        return json_answer(await classify_image(self.service, request))

    def _ready(self, request: Request) -> dict[str, Any]:
        """All models are loaded and warmed up, no engine failed, the server is not stopping; one named is loaded."""
        named = {"name": self._model(request).source.name} if request.target[0] else {}
        if not self.service.ready:
            raise RequestError("the server is not ready", Code.UNAVAILABLE)
        return {**named, "ready": True}

    def _names(self, request: Request) -> dict[str, Any]:
        """Names, versions, and which give no classes and why (not part of the protocol; the page needs it)."""
        found: dict[str, dict[str, str]] = {}
        for model in self.service.repository.all():
            found.setdefault(model.source.name, {})[model.source.version] = model.takes_no_images
        return {"models": [{"name": n, "versions": list(found[n]), "takes_no_images": found[n]} for n in sorted(found)]}

    def _index(self, request: Request) -> list[dict[str, str]]:
        """What the repository holds, as Triton's index extension has it."""
        return self.service.repository.index(bool(_json_object(request, empty=True).get("ready")))

    def _manifest(self, request: Request) -> Manifest:
        """The model card: the artefact's manifest (not part of the protocol)."""
        manifest = self._model(request).manifest
        if manifest is None:
            raise RequestError("this model came without a manifest", Code.NOT_FOUND)
        return manifest

    def _logging(self, request: Request) -> dict[str, Any]:
        """Log settings, shown or changed."""
        if request.method == "POST":
            documents.change_log_settings(self.service.log_settings, _json_object(request))
        return self.service.log_settings


class MetricsApp(App):
    """The metrics port: GET /metrics, and nothing else."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._exposition = Exposition(service)

    def admit(self, request: Request, *, crowded: bool, declared: int) -> None:
        """One document, for anybody who reaches the port."""
        if request.path != "/metrics":
            raise RequestError("Not Found", Code.NOT_FOUND)
        if request.method not in ("GET", "HEAD"):
            raise RequestError("Method Not Allowed", Code.METHOD, allow="GET")
        request.handler = self.metrics

    async def metrics(self, request: Request) -> Answer:
        """The exposition."""
        return Answer(self._exposition.text(), [(b"content-type", self._exposition.media_type)])


def _document(make: Callable[[Request], Any]) -> Handler:
    """A handler that answers with JSON."""

    async def answer(request: Request) -> Answer:
        return json_answer(make(request))

    return answer


def _file(content: bytes, headers: Headers) -> Handler:
    async def answer(request: Request) -> Answer:
        return Answer(content, list(headers))

    return answer


def _page_file(path: Path) -> Handler:
    return _file(path.read_bytes(), [(b"content-type", MEDIA[path.suffix]), *PAGE_HEADERS])


def header_size(value: bytes | None) -> int | None:
    """Inference-Header-Content-Length as an int; raises RequestError."""
    if value is None:
        return None
    if not value.isdigit() or len(value) > 12:
        raise RequestError("Inference-Header-Content-Length must be a whole number of bytes")
    return int(value)


def _json_object(request: Request, *, empty: bool = False) -> dict[str, object]:
    body = request.body()
    if empty and not len(body):
        return {}
    try:
        return msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        raise RequestError("the body must be a JSON object of settings") from None
