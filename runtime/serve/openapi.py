"""The OpenAPI 3.1 document of the REST side, for people, generators and fuzzers."""

from __future__ import annotations

from typing import Any

from runtime.serve.codec import MAX_NAME, MAX_RANK
from runtime.serve.protocol import SERVER_NAME, server_version
from runtime.serve.settings import Settings
from runtime.serve.signature import ITEM_BYTES

Json = dict[str, Any]


def document(settings: Settings) -> Json:
    """The document; `settings` decides whether a bearer token is part of it."""
    paths: Json = {
        "/v2": {"get": _get("Server metadata", "ServerMetadata", 200, 401)},
        "/v2/health/live": {"get": _empty("Liveness")},
        "/v2/health/ready": {"get": _empty("Readiness", 503)},
        "/v2/models": {"get": _get("Names and versions of all models", "Models", 200, 401)},
        "/v2/models/stats": {"get": _get("Statistics of every model", "Statistics", 200, 401)},
        "/v2/logging": {
            "get": _get("Log settings", "LogSettings", 200, 401),
            "post": _post("Change log settings", "LogSettings", "LogSettings", 200, 400, 401, 413, 501, 503),
        },
        "/v2/trace/setting": {
            "get": _get("Trace settings", "Settings", 200, 401),
            "post": _post("Change trace settings", "Settings", "Settings", 200, 400, 401, 413, 501, 503),
        },
        "/openapi.json": {"get": _get("This document", "Anything", 200, 401)},
    }
    for prefix, versioned in (("/v2/models/{model}", False), ("/v2/models/{model}/versions/{version}", True)):
        parameters = [_path("model"), *([_path("version")] if versioned else [])]
        infer = _post("Inference", "InferRequest", "InferResponse", 200, 400, 401, 404, 408, 413, 415, 500, 501, 503)
        infer["requestBody"]["content"]["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
        infer["responses"]["200"]["content"]["application/octet-stream"] = {"schema": {}}
        infer["parameters"] = [
            {
                "name": "Inference-Header-Content-Length",
                "in": "header",
                "description": "Length of the JSON part; binary tensors follow it. 0: the body is one raw tensor.",
                "schema": {"type": "integer", "minimum": 0},
            }
        ]
        classify = _get("Classify an image file", "Classes", 200, 400, 401, 404, 408, 413, 500, 503)
        classify["requestBody"] = {
            "required": True,
            "content": {
                t: {"schema": {"type": "string", "format": "binary"}} for t in ("image/*", "application/octet-stream")
            },
        }
        classify["parameters"] = [
            {"name": "k", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}}
        ]
        entries: Json = {
            "": {"get": _get("Model metadata", "ModelMetadata", 200, 401, 404)},
            "/ready": {"get": _empty("Model readiness", 401, 404, 503)},
            "/config": {"get": _get("Model configuration", "Anything", 200, 401, 404)},
            "/stats": {"get": _get("Model statistics", "Statistics", 200, 401, 404)},
            "/manifest": {"get": _get("Model card", "Anything", 200, 401, 404)},
            "/infer": {"post": infer},
            "/classify": {"post": classify},
        }
        for suffix, methods in entries.items():
            paths[prefix + suffix] = {**methods, "parameters": parameters}
    paths["/v2/models/{model}/trace/setting"] = {
        "parameters": [_path("model")],
        "get": _get("Trace settings", "Settings", 200, 401, 404),
        "post": _post("Change trace settings", "Settings", "Settings", 200, 400, 401, 404, 413, 501, 503),
    }
    answer: Json = {
        "openapi": "3.1.0",
        "info": {"title": f"{SERVER_NAME} inference server", "version": server_version()},
        "paths": paths,
        "components": {"schemas": _schemas()},
    }
    if settings.token:
        answer["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        answer["security"] = [{"token": []}]
    return answer


def _path(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _body(schema: str) -> Json:
    return {"application/json": {"schema": _ref(schema)}}


def _responses(schema: str | None, *statuses: int) -> Json:
    answer: Json = {}
    for status in statuses:
        ok = status == 200
        answer[str(status)] = {"description": "OK" if ok else "Error"}
        if not ok:
            answer[str(status)]["content"] = _body("Error")
        elif schema:
            answer[str(status)]["content"] = _body(schema)
    return answer


def _get(summary: str, schema: str, *statuses: int) -> Json:
    return {"summary": summary, "responses": _responses(schema, *statuses)}


def _empty(summary: str, *statuses: int) -> Json:
    return {"summary": summary, "responses": _responses(None, 200, *statuses)}


def _post(summary: str, takes: str, gives: str, *statuses: int) -> Json:
    return {**_get(summary, gives, *statuses), "requestBody": {"required": True, "content": _body(takes)}}


def _object(required: list[str], **properties: Json) -> Json:
    return {"type": "object", "required": required, "properties": properties}


def _array(items: Json, **extra: Any) -> Json:
    return {"type": "array", "items": items, **extra}


def _schemas() -> Json:
    text: Json = {"type": "string"}
    whole: Json = {"type": "integer"}
    name: Json = {"type": "string", "maxLength": MAX_NAME}
    datatype: Json = {"type": "string", "enum": [*ITEM_BYTES, "BYTES"]}
    parameters: Json = {
        "type": "object",
        "maxProperties": 64,
        "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
    }
    tensor = _object(["name", "datatype", "shape"], name=name, datatype=datatype, shape=_array(whole))
    port = _object(["name", "datatype", "shape"], name=name, datatype=text, shape=_array(whole))
    return {
        "Anything": {"type": "object"},
        "Error": _object(["error"], error=text),
        "ServerMetadata": _object(["name", "version", "extensions"], name=text, version=text, extensions=_array(text)),
        "Models": _object(["models"], models=_array(_object(["name", "versions"], name=text, versions=_array(text)))),
        "ModelMetadata": _object(
            ["name", "versions", "platform", "inputs", "outputs"],
            name=text,
            versions=_array(text),
            platform=text,
            inputs=_array(port),
            outputs=_array(port),
        ),
        "Statistics": _object(["model_stats"], model_stats=_array({"type": "object"})),
        "Settings": {"type": "object"},
        "LogSettings": {"type": "object", "properties": {"log_info": {"type": "boolean"}}},
        "InferRequest": _object(
            ["inputs"],
            id=text,
            parameters=parameters,
            inputs=_array(
                _object(
                    ["name", "shape", "datatype"],
                    name=name,
                    datatype=datatype,
                    shape=_array({"type": "integer", "minimum": 0}, maxItems=MAX_RANK),
                    parameters=parameters,
                    data={"type": "array"},
                ),
                maxItems=64,
            ),
            outputs=_array(_object(["name"], name=name, parameters=parameters), maxItems=64),
        ),
        "InferResponse": _object(
            ["model_name", "model_version", "outputs"],
            model_name=text,
            model_version=text,
            id=text,
            outputs=_array(tensor),
        ),
        "Classes": _object(
            ["model_name", "model_version", "classes", "times_ms"],
            model_name=text,
            model_version=text,
            classes=_array(
                _object(
                    ["index", "label", "probability"],
                    index=whole,
                    label=text,
                    probability={"type": "number", "minimum": 0, "maximum": 1},
                )
            ),
            times_ms={"type": "object", "additionalProperties": {"type": "number"}},
        ),
    }
