"""What can go wrong with one request, in the protocol's own terms."""

from __future__ import annotations

from enum import Enum


class Code(Enum):
    """Triton's error codes: HTTP status, name of the gRPC status, `reason` label of nv_inference_request_failure.

    REJECTED is for want of capacity alone: the autoscaler adds replicas for it.
    """

    INVALID = (400, "INVALID_ARGUMENT", "OTHER")
    UNAUTHENTICATED = (401, "UNAUTHENTICATED", "OTHER")
    NOT_FOUND = (404, "NOT_FOUND", "OTHER")
    METHOD = (405, "UNIMPLEMENTED", "OTHER")
    TIMEOUT_BODY = (408, "DEADLINE_EXCEEDED", "OTHER")
    TOO_LARGE = (413, "RESOURCE_EXHAUSTED", "OTHER")
    UNSUPPORTED_TYPE = (415, "INVALID_ARGUMENT", "OTHER")
    HEADER = (431, "RESOURCE_EXHAUSTED", "OTHER")
    CANCELLED = (499, "CANCELLED", "CANCELED")
    INTERNAL = (500, "INTERNAL", "BACKEND")
    UNSUPPORTED = (501, "UNIMPLEMENTED", "OTHER")
    OVERLOADED = (503, "RESOURCE_EXHAUSTED", "REJECTED")
    UNAVAILABLE = (503, "UNAVAILABLE", "REJECTED")
    EXPIRED = (503, "DEADLINE_EXCEEDED", "REJECTED")

    def __init__(self, http: int, grpc: str, reason: str) -> None:
        self.http, self.grpc, self.reason = http, grpc, reason


class RequestError(Exception):
    """A request that cannot be answered; the message goes to the client, so it never holds a path or a trace."""

    def __init__(self, message: str, code: Code = Code.INVALID, *, allow: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.allow = allow
        """Methods that a path takes, where the request's was another."""


def too_large(limit: int) -> RequestError:
    """A body of more than `limit` bytes."""
    return RequestError(f"the request body is larger than {limit:,} bytes, the most that is taken here", Code.TOO_LARGE)


def without_paths(message: str) -> str:
    """A runner's refusal as the client may see it: one line, no file system path."""
    return " ".join(word for word in message.split() if not word.startswith("/"))[:300]
