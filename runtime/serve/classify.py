"""An image file in, the most probable classes out: the manifest's preprocessing, the batcher, a softmax."""

from __future__ import annotations

import asyncio
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from gmconv.errors import RefusedError
from runtime.runners.base import Array
from runtime.serve.body import read_body
from runtime.serve.codec import Decoded
from runtime.serve.errors import Code, RequestError
from runtime.serve.models import ModelVersion

if TYPE_CHECKING:
    from starlette.requests import Request

    from runtime.serve.service import Service


async def classify_image(
    service: Service, model: ModelVersion, request: Request, entry: dict[str, Any]
) -> dict[str, Any]:
    """Answer POST .../classify; `?k=` classes, 5 by default. Raises RequestError."""
    started = monotonic_ns()
    headers = dict(request.scope["headers"])
    try:
        k = _count(request.query_params.get("k", "5"))
        preprocessing = model.manifest.preprocessing if model.manifest else None
        if preprocessing is None:
            raise RequestError(
                f"model '{model.source.name}' has no preprocessing in its manifest: send tensors to infer"
            )
        if len(model.signature.inputs) != 1:
            raise RequestError(f"model '{model.source.name}' has several inputs: send tensors to infer")
        if len(next(iter(model.signature.outputs.values())).shape) != 2:
            raise RequestError(
                f"the first output of model '{model.source.name}' is not (batch, classes): send tensors to infer"
            )
        most = service.settings.max_image_bytes
        too_large = RequestError(f"the image file is larger than {most:,} bytes", Code.TOO_LARGE)
        model.batcher.check()
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size[:20]) > most:
            raise too_large
        body, reserved = await read_body(service, headers, request.receive, 0)
        try:
            if len(body) > most:
                raise too_large
            async with service.decoders:
                if (connection := request.scope.get("connection")) is not None and connection.gone:
                    raise RequestError("the client went away", Code.CANCELLED)
                pixels = await asyncio.to_thread(_load, bytes(body), preprocessing)
            prepared = monotonic_ns()
            port = next(iter(model.signature.inputs.values()))
            feeds = {port.name: np.ascontiguousarray(pixels[None], port.dtype)}
            model.signature.check_shape(port, feeds[port.name].shape)
            outputs, item = await service.infer(
                model,
                Decoded(feeds, 1, []),
                client=request.scope["client"],
                connection=request.scope.get("connection"),
            )
        finally:
            service.inflight_bytes -= reserved
    except RequestError as error:
        model.stats.failed(monotonic_ns() - started, error.code)
        raise
    times = service.succeeded(model, item, started)
    entry.update(times, model=model.source.name, version=model.source.version)
    scores = np.asarray(next(iter(outputs.values())))[0].astype(np.float64).ravel()
    probabilities = softmax(scores)
    order = np.argsort(-probabilities, kind="stable")[:k]
    labels = model.signature.labels or ()
    batch = item.batch
    assert batch is not None
    return {
        "model_name": model.source.name,
        "model_version": model.source.version,
        "id": entry["request_id"],
        "classes": [
            {
                "index": int(i),
                "label": labels[i] if i < len(labels) else str(i),
                "probability": float(probabilities[i]),
                "score": float(scores[i]) if np.isfinite(scores[i]) else None,
            }
            for i in order
        ],
        "times_ms": {
            "decode": (prepared - started) / 1e6,
            "queue": (batch.taken - item.queued) / 1e6,
            "compute": (batch.done - batch.taken) / 1e6,
            "total": (monotonic_ns() - started) / 1e6,
        },
        "batch": batch.rows,
    }


def softmax(scores: Array) -> Array:
    """Probabilities of a vector of scores, float64; zeros where the network returned NaN only."""
    finite = np.nan_to_num(scores, nan=-np.inf, posinf=np.finfo(np.float64).max)
    top = finite.max(initial=-np.inf)
    if not np.isfinite(top):
        return np.zeros_like(finite)
    powers = np.exp(finite - top)
    return np.asarray(powers / powers.sum())


def _load(body: bytes, preprocessing: Any) -> Array:
    from gmconv.images import load_image

    try:
        return np.asarray(load_image(body, preprocessing))
    except RefusedError as refusal:
        raise RequestError(refusal.message[:200]) from None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 1000 or len(text) > 4:
        raise RequestError("k must be a whole number from 1 to 1000")
    return int(text)
