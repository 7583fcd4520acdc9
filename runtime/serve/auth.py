"""The one place that decides whether a caller may go on: HTTP and gRPC both ask `Gate.allows`."""

from __future__ import annotations

import hmac
from hashlib import sha256
from pathlib import Path

from gmconv.errors import RefusedError

MIN_TOKEN = 16


class Gate:
    """Compares bearer tokens in constant time; without a token it is open."""

    def __init__(self, token: str | None) -> None:
        self._digest = sha256(token.encode()).digest() if token else None

    def change(self, token: str) -> None:
        """From now on ask for `token`."""
        self._digest = sha256(token.encode()).digest()

    def allows(self, authorization: bytes | None) -> bool:
        """True if there is no token, or `authorization` is `Bearer <the token>`."""
        if self._digest is None:
            return True
        scheme, _, given = (authorization or b"").partition(b" ")
        match = hmac.compare_digest(sha256(given.strip()).digest(), self._digest)
        return match and scheme.lower() == b"bearer"


def read_token(path: Path) -> str:
    """The token in a file. Raises RefusedError when it is short or cannot be read."""
    try:
        return check_token(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path}: the token file cannot be read ({error})") from error


def check_token(text: str, origin: str) -> str:
    """`text` without the white space around it, such as the newline that an editor or `echo` leaves.

    Raises RefusedError when it is too short to be a secret, or holds what no header can carry.
    """
    token = text.strip()
    if len(token) < MIN_TOKEN:
        raise RefusedError(f"{origin}: the token must have at least {MIN_TOKEN} characters; try `openssl rand -hex 32`")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise RefusedError(f"{origin}: the token must be printable ASCII without spaces; try `openssl rand -hex 32`")
    return token
