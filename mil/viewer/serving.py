"""The server: one address, one random token, until it is stopped; in the foreground, or beside a notebook."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from extract.config import ConfigError
from mil.viewer.app import make_app
from mil.viewer.config import LOOPBACK, ViewConfig
from mil.viewer.guard import Door, Guarded
from mil.viewer.pages import Pages
from mil.viewer.shown import Shown, shown_runs, shown_slides

REMOTE = (
    "WARNING: other machines can connect to this viewer. Whoever has the URL sees every slide and can write reviews, "
    "and the connection is not encrypted. On a network that you do not know, use `ssh -L` instead."
)


@dataclass(frozen=True)
class Serving:
    """A server that is ready to run: its URL, which holds the token, and the socket that it listens on."""

    url: str
    server: uvicorn.Server
    sockets: list[socket.socket]
    pages: Pages

    def run(self) -> None:
        """Until Ctrl-C; what is seen first is made meanwhile."""
        threading.Thread(target=self.pages.warm_up, daemon=True, name="mil.view: first slide").start()
        self.server.run(sockets=self.sockets)

    def in_background(self) -> threading.Thread:
        """In a thread that ends with the process, or with `stop`."""
        thread = threading.Thread(target=self.run, daemon=True, name="mil.view")
        thread.start()
        return thread

    def stop(self) -> None:
        self.server.should_exit = True


def what_to_show(config: ViewConfig, parts: Sequence[tuple[str, Path]]) -> Shown:
    """Runs (`parts`: name and folder of each aggregator), or slides without any."""
    return shown_runs(parts, config) if parts else shown_slides(config)


def make_server(shown: Shown, config: ViewConfig, *, framed: bool = False) -> Serving:
    """Listening, not yet answering.

    Args:
        framed: a notebook may show the page in a frame.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listening = listen(config.host, config.port)
    port = listening.getsockname()[1]
    token = config.token or secrets.token_urlsafe(24)
    remote = config.host not in LOOPBACK
    pages = Pages(shown, config.memory_mb)
    _ = pages.catalogue  # made now, so that the first page does not wait for it
    app = Guarded(make_app(pages), Door(token, remote, framed))
    settings = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        ws="none",
        lifespan="off",
        loop="asyncio",
        http="h11",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=32 * 1024,
    )
    return Serving(f"http://{shown_host(config.host)}:{port}/{token}/", uvicorn.Server(settings), [listening], pages)


def listen(host: str, port: int) -> socket.socket:
    """A socket on this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # said to be TCP, else asyncio leaves Nagle's algorithm on, and every other picture comes 40 ms later
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        advice = "; port=0 takes any that is free" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError("cannot listen", [f"host={host} port={port}: {error.strerror}{advice}"]) from None
    return listening


def shown_host(host: str) -> str:
    """What a browser calls it."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def serve(config: ViewConfig, parts: Sequence[tuple[str, Path]]) -> None:
    """Show it until Ctrl-C."""
    serving = make_server(what_to_show(config, parts), config)
    if config.host not in LOOPBACK:
        print(REMOTE, file=sys.stderr)
    print(f"Open {serving.url}\nCtrl-C stops it.", flush=True)
    if config.browser and has_screen():
        webbrowser.open(serving.url)
    serving.run()


def has_screen() -> bool:
    """Else the system's browser may be one for terminals, which would take this one."""
    graphical = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.platform in ("darwin", "win32") or bool(graphical)
