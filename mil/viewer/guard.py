"""Who may ask: only with the token, only under a name of this machine, only from the viewer's own page; and what the
page may do.

The token is the first part of every path, so that no request is answered because a browser adds something by itself
(there are no cookies): another site that a person has open can neither read nor write here. A name in `Host` that is
not this machine's is how such a site would get round that (DNS rebinding); addresses cannot be rebound.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from dataclasses import dataclass

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mil.viewer.config import LOOPBACK
from mil.viewer.vendored import STYLE_OF_OPENSEADRAGON

LARGEST_BODY = 512 * 1024
LONGEST_PATH = 512

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": f"'self' '{STYLE_OF_OPENSEADRAGON}'",
    "img-src": "'self' blob: data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
}
"""The page fetches from here only, and runs no script but its own files."""
IN_A_NOTEBOOK = "http://localhost:* http://127.0.0.1:* vscode-webview:"

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def names_of_this_machine() -> frozenset[str]:
    """What it may be called in a URL by other machines; their addresses are allowed as well."""
    return frozenset(name.casefold() for name in (socket.gethostname(), socket.getfqdn()) if name)


@dataclass(frozen=True)
class Door:
    """token: first part of every path. remote: other machines may connect. framed: a notebook may show the page."""

    token: str
    remote: bool = False
    framed: bool = False

    def refusal(self, scope: Scope) -> str:
        """Why this request is not answered; "" if it is."""
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == "host"]
        origins = [value for name, value in headers if name == "origin"]
        if len(hosts) != 1 or not self.is_ours(hosts[0]):
            return "this is not the name of the machine that the viewer runs on; use the URL that it printed"
        if any(origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}") for origin in origins):
            return "asked by another site"
        if len(scope["path"]) > LONGEST_PATH:
            return "the path is too long"
        given = scope["path"].split("/")[1] if scope["path"].startswith("/") else ""
        if not secrets.compare_digest(given.encode("utf-8", "replace"), self.token.encode()):
            return "no token, or another one; use the URL that the viewer printed"
        return ""

    def is_ours(self, host: str) -> bool:
        """Whether this is a name of the machine, with any port: one end of a tunnel may have another."""
        name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "0")
        if not (port.isascii() and port.isdigit()):
            return False
        name = name.strip("[]").casefold()
        return name in LOOPBACK or (self.remote and (is_address(name) or name in names_of_this_machine()))

    @property
    def headers(self) -> dict[str, str]:
        """Of every answer."""
        framers = IN_A_NOTEBOOK if self.framed else "'none'"
        policy = "; ".join(f"{what} {where}" for what, where in (POLICY | {"frame-ancestors": framers}).items())
        return HEADERS | {"Content-Security-Policy": policy}


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guarded:
    """The app behind the door: what is inside sees paths without the token, and bodies of bounded size."""

    def __init__(self, app: ASGIApp, door: Door):
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(k.lower().encode(), v.encode()) for k, v in self.door.headers.items()]
                names = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((k, v) for k, v in own if k not in names)]
            await send(message)

        why = self.door.refusal(scope)
        if why:
            await PlainTextResponse(f"Refused: {why}.\n", 403)(scope, receive, with_headers)
            return
        inner = "/" + scope["path"].split("/", 2)[2] if scope["path"].count("/") > 1 else "/"
        await self.app({**scope, "path": inner, "raw_path": inner.encode()}, Bounded(receive), with_headers)


class TooLargeError(Exception):
    """A body is larger than anything that is written here."""


class Bounded:
    """Reads a body up to a size."""

    def __init__(self, receive: Receive):
        self.receive, self.seen = receive, 0

    async def __call__(self) -> Message:
        message = await self.receive()
        self.seen += len(message.get("body", b""))
        if self.seen > LARGEST_BODY:
            raise TooLargeError
        return message
