"""An image file in, the most probable classes out: the manifest's preprocessing, the batcher, a softmax."""

from __future__ import annotations

from time import monotonic_ns
from typing import Any
from urllib.parse import parse_qs

import numpy as np

from runtime.runners.base import Array
from runtime.serve.errors import Code, RequestError
from runtime.serve.http.messages import Request
from runtime.serve.protocol.codec import Decoded
from runtime.serve.service import Service


async def classify_image(service: Service, request: Request) -> dict[str, Any]:
    """Answer POST .../classify; `?k=` classes, 5 by default. Raises RequestError."""
    call = request.call
    model = call.model
    assert model is not None
    assert model.manifest is not None
    assert model.manifest.preprocessing is not None
    k = _count(parse_qs(request.query).get("k", ["5"])[-1])
    if not (image := bytes(request.body())):
        raise RequestError("the body is empty; send the image file: curl --data-binary @image.png")
    began = monotonic_ns()
    try:
        pixels = await service.decoders.decode(image, model.manifest.preprocessing)
    except RequestError as error:
        kind = request.headers.get(b"content-type", b"")
        if error.code is Code.INVALID and kind.startswith(b"multipart/"):
            error.message = "the body is a form (curl -F); send the file itself: curl --data-binary @image.png"
        elif error.code is Code.INVALID and kind.startswith(b"application/x-www-form-urlencoded"):
            error.message += " (curl -d strips its newlines: send it with --data-binary @image.png)"
        raise
    prepared = monotonic_ns()
    port = next(iter(model.signature.inputs.values()))
    feeds = {port.name: np.ascontiguousarray(pixels[None], port.dtype)}
    call.release()
    outputs, item = await service.infer(call, Decoded(feeds, 1, []), request.client)
    call.succeeded(item)
    scores = np.asarray(next(iter(outputs.values())))[0].astype(np.float64).ravel()
    probabilities = softmax(scores)
    order = np.argsort(-probabilities, kind="stable")[:k]
    labels = model.signature.labels or ()
    return {
        "model_name": model.source.name,
        "model_version": model.source.version,
        "id": call.request_id,
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
            "decode": (prepared - began) / 1e6,
            "queue": call.entry["queue_us"] / 1e3,
            "compute": call.entry["compute_us"] / 1e3,
            "total": (monotonic_ns() - call.started) / 1e6,
        },
        "batch": call.entry["batch"],
    }


def softmax(scores: Array) -> Array:
    """Probabilities of a vector of scores, float64; zeros where the network returned NaN only."""
    finite = np.nan_to_num(scores, nan=-np.inf, posinf=np.finfo(np.float64).max)
    top = finite.max(initial=-np.inf)
    if not np.isfinite(top):
        return np.zeros_like(finite)
    powers = np.exp(finite - top)
    return np.asarray(powers / powers.sum())


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= 1000):
        raise RequestError("k must be a whole number from 1 to 1000")
    return int(text)
