"""The one place that decides whether a caller may go on: HTTP and gRPC both ask `Gate.allows`."""

from __future__ import annotations

import hmac
from hashlib import sha256
from pathlib import Path

from gmconv.errors import RefusedError


class Gate:
    """Compares bearer tokens in constant time; without a token it is open."""

    def __init__(self, token: str | None) -> None:
        self._digest = sha256(token.encode()).digest() if token else None

    @property
    def closed(self) -> bool:
        """Whether a token is asked for at all."""
        return self._digest is not None

    def allows(self, authorization: bytes | str | None) -> bool:
        """True if there is no token, or `authorization` is `Bearer <the token>`."""
        if self._digest is None:
            return True
        raw = authorization.encode("utf-8", "surrogateescape") if isinstance(authorization, str) else authorization
        scheme, _, given = (raw or b"").partition(b" ")
        match = hmac.compare_digest(sha256(given.strip()).digest(), self._digest)
        return match and scheme.lower() == b"bearer"


def read_token(path: Path) -> str:
    """The token in a file, surrounding white space removed. Raises RefusedError when empty or unreadable."""
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path}: the token file cannot be read ({error})") from error
    if len(token) < 16:
        raise RefusedError(f"{path}: the token must have at least 16 characters; try `openssl rand -hex 32`")
    return token
