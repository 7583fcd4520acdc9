"""Tokens and certificates. HTTP and gRPC both ask `Gate.allows` whether a caller may go on."""

from __future__ import annotations

import hmac
import os
import ssl
from hashlib import sha256

from gmconv.errors import RefusedError
from runtime.serve.settings import MIN_TOKEN, TOKEN_VARIABLE, Settings

ALPN = {"http": "http/1.1", "grpc": "h2"}


class Gate:
    """Compares bearer tokens in constant time; without a token it is open."""

    def __init__(self, token: str | None) -> None:
        self.open = token is None
        self._digest = sha256((token or "").encode()).digest()

    def allows(self, authorization: bytes | None) -> bool:
        """True if there is no token, or `authorization` is `Bearer <the token>`."""
        if self.open:
            return True
        scheme, _, given = (authorization or b"").partition(b" ")
        match = hmac.compare_digest(sha256(given.strip()).digest(), self._digest)
        return match and scheme.lower() == b"bearer"


def find_token(settings: Settings) -> str | None:
    """The token that callers must bring: the file's, `settings.token`, or the environment's; None: there is none.

    Without the white space around it, such as the newline that an editor or `echo` leaves. Raises RefusedError when the
    file cannot be read, and when the token is too short to be a secret (an empty one is a mistake that would leave the
    door open), or holds what no header can carry.
    """
    origin = str(settings.token_file or TOKEN_VARIABLE)
    try:
        given = settings.token_file.read_text("utf-8") if settings.token_file else settings.token
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{origin}: the token file cannot be read ({error})") from error
    given = os.environ.get(TOKEN_VARIABLE) if given is None else given
    if given is None:
        return None
    token = given.strip()
    if len(token) < MIN_TOKEN:
        raise RefusedError(f"{origin}: the token must have at least {MIN_TOKEN} characters; try `openssl rand -hex 32`")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise RefusedError(f"{origin}: the token must be printable ASCII without spaces; try `openssl rand -hex 32`")
    return token


def make_tls(settings: Settings, protocol: str) -> ssl.SSLContext | None:
    """The context of a port for `protocol`; None without a certificate, and for metrics. Raises RefusedError."""
    if not (settings.tls_cert and settings.tls_key) or protocol not in ALPN:
        return None

    def ask() -> str:
        raise RefusedError(f"{settings.tls_key}: the key has a passphrase; give one without")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([ALPN[protocol]])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=ask)
    except (OSError, ValueError) as error:
        raise RefusedError(f"{settings.tls_cert}: the TLS pair cannot be used ({error})") from error
    return context
