"""The REST side: which handler a request is for, whether it may go on, and every handler but classify's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import unquote

import msgspec

from runtime.serve.errors import Code, RequestError
from runtime.serve.http.body import encode_body, inflate_body
from runtime.serve.http.classify import check_classifiable, classify_image
from runtime.serve.http.messages import JSON, Answer, Headers, Request, error_answer, json_answer, too_large
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
SMALL_BODY = 64 * 1024
OFF_LOOP = 64 * 1024
"""Bytes of JSON from which on they are read and written beside the event loop."""


class App:
    """The application: `admit` looks at a head, `answer` runs the handler. Both turn nothing but errors away."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._page = {p.name: p.read_bytes() for p in PAGE.iterdir() if p.suffix in MEDIA}
        self._openapi = documents.openapi(OPENAPI.read_bytes(), secured=service.settings.token is not None)
        page = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
        self._fixed: dict[str, dict[str, Handler]] = {
            "/v2": {"GET": self.server},
            "/v2/health/live": {"GET": self.live},
            "/v2/health/ready": {"GET": self.ready},
            "/v2/models": {"GET": self.models},
            "/v2/models/stats": {"GET": self.all_statistics},
            "/v2/repository/index": {"POST": self.index},
            "/v2/logging": {"GET": self.logging, "POST": self.update_logging},
            "/v2/trace/setting": {"GET": self.trace, "POST": self.update_trace},
            "/openapi.json": {"GET": self.openapi},
            **{path: {"GET": self.page_file(name)} for path, name in page.items()},
        }
        self._of_model: dict[str, dict[str, Handler]] = {
            "": {"GET": self.metadata},
            "ready": {"GET": self.model_ready},
            "config": {"GET": self.config},
            "stats": {"GET": self.statistics},
            "manifest": {"GET": self.manifest},
            "infer": {"POST": self.infer},
            "classify": {"POST": self.classify},
            "trace/setting": {"GET": self.trace, "POST": self.update_trace},
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
            else:
                check_classifiable(model)
        if declared > request.limit:
            raise too_large(request.limit)
        request.call.trace = {k.decode(): headers[k].decode("latin-1") for k in headers if k.startswith(b"trace")}

    def _find(self, request: Request) -> dict[str, Handler]:
        if methods := self._fixed.get(request.path):
            return methods
        parts = request.path.split("/")
        if parts[:3] == ["", "v2", "models"] and len(parts) > 3 and parts[3]:
            name, rest, version = parts[3], parts[4:], ""
            if len(rest) > 1 and rest[0] == "versions" and rest[1]:
                version, rest = rest[1], rest[2:]
            verb = "/".join(rest)
            methods = self._of_model.get(verb)
            if methods and (not rest or rest[-1]) and not (version and verb == "trace/setting"):
                request.target = unquote(name), unquote(version)
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
        json_size = len(body) if request.header_length is None else request.header_length
        if json_size > OFF_LOOP:
            decoded = await service.apart(codec.decode, body, request.header_length, model.signature)
            call.release()
            call.take(sum(array.nbytes for array in decoded.feeds.values()))
        else:
            decoded = codec.decode(body, request.header_length, model.signature)
        del body
        outputs, item = await service.infer(call, decoded, request.client)
        source = model.source
        if decoded.json_elements(outputs) > OFF_LOOP // 16:
            content, json_length = await service.apart(
                codec.encode, source.name, source.version, decoded, outputs, model.signature
            )
        else:
            content, json_length = codec.encode(source.name, source.version, decoded, outputs, model.signature)
        headers = [JSON] if json_length is None else [OCTETS, (b"inference-header-content-length", b"%d" % json_length)]
        if accepted := request.headers.get(b"accept-encoding"):
            content = await encode_body(service, accepted, content, headers)
        call.succeeded(item)
        return Answer(content, headers)

    async def classify(self, request: Request) -> Answer:
        """An image file in the body, labels and probabilities out."""
        return json_answer(await classify_image(self.service, request))

    async def live(self, request: Request) -> Answer:
        """The process answers."""
        return json_answer({"live": True})

    async def ready(self, request: Request) -> Answer:
        """All models are loaded and warmed up, no engine failed, the server is not stopping."""
        if not self.service.ready:
            raise RequestError("the server is not ready", Code.UNAVAILABLE)
        return json_answer({"ready": True})

    async def model_ready(self, request: Request) -> Answer:
        """Ready when loaded (only warmed-up models are), and the server is."""
        name = self._model(request).source.name
        await self.ready(request)
        return json_answer({"name": name, "ready": True})

    async def server(self, request: Request) -> Answer:
        """Server metadata."""
        return json_answer(documents.to_dict(documents.server_metadata()))

    async def models(self, request: Request) -> Answer:
        """Names and versions (not part of the protocol; the page needs it)."""
        repository = self.service.repository
        names = sorted({m.source.name for m in repository.all()})
        return json_answer({"models": [{"name": n, "versions": repository.versions(n)} for n in names]})

    async def index(self, request: Request) -> Answer:
        """What the repository holds, as Triton's index extension has it."""
        only_ready = _json_object(request, empty=True).get("ready", False)
        entries = self.service.repository.index()
        return json_answer([e for e in entries if e["state"] == "READY" or not only_ready])

    async def metadata(self, request: Request) -> Answer:
        """Model metadata."""
        return json_answer(documents.to_dict(documents.model_metadata(self._model(request), self.service.repository)))

    async def config(self, request: Request) -> Answer:
        """The model's configuration as Triton would show it."""
        return json_answer(documents.to_dict(documents.model_config(self._model(request))))

    async def statistics(self, request: Request) -> Answer:
        """Counters of one version, or of all versions when none is named."""
        model, repository = self._model(request), self.service.repository
        versions = [] if request.target[1] else repository.versions(model.source.name)
        chosen = [repository.get(model.source.name, v) for v in versions] or [model]
        return json_answer(documents.to_dict(documents.statistics(chosen)))

    async def all_statistics(self, request: Request) -> Answer:
        """Counters of every model."""
        return json_answer(documents.to_dict(documents.statistics(self.service.repository.all())))

    async def manifest(self, request: Request) -> Answer:
        """The model card: the artefact's manifest (not part of the protocol)."""
        manifest = self._model(request).manifest
        if manifest is None:
            raise RequestError("this model came without a manifest", Code.NOT_FOUND)
        return json_answer(manifest)

    async def logging(self, request: Request) -> Answer:
        """Log settings."""
        return json_answer(self.service.log_settings.values)

    async def update_logging(self, request: Request) -> Answer:
        """Change log settings."""
        self.service.log_settings.update(_json_object(request))
        return json_answer(self.service.log_settings.values)

    async def trace(self, request: Request) -> Answer:
        """Trace settings."""
        if request.target[0]:
            self._model(request)
        settings = documents.trace_settings(self.service.tracer is not None)
        return json_answer({k: list(v) if k == "trace_level" else v[0] for k, v in settings.items()})

    async def update_trace(self, request: Request) -> Answer:
        """Trace settings are chosen at start; what is already so is accepted."""
        documents.check_trace_update(_json_object(request), self.service.tracer is not None)
        return await self.trace(request)

    async def openapi(self, request: Request) -> Answer:
        """This API, described."""
        return Answer(self._openapi)

    def page_file(self, name: str) -> Handler:
        """A handler for one of the page's files."""
        answer_headers = [(b"content-type", MEDIA[Path(name).suffix]), *PAGE_HEADERS]

        async def answer(request: Request) -> Answer:
            return Answer(self._page[name], list(answer_headers))

        return answer


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
