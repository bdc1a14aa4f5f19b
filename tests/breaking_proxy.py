"""A server before the object store that breaks what a test wants broken: writes refused, or cut off in the middle."""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ACCESS_DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
)
WRITES = ("PUT", "POST", "DELETE")


class Proxy:
    """`address` stands for `upstream`. `refused`: every write is answered with 403. `cuts`: so many of the next writes
    of objects whose name holds `of` are cut off half-way, and counted in `n_cut`."""

    def __init__(self, upstream: str):
        self.upstream, self.refused, self.cuts, self.of, self.n_cut = urlsplit(upstream).netloc, False, 0, "", 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

            def log_message(self, *_: object) -> None:
                """Nothing: the tests' output is for the tests."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        n_bytes = int(request.headers.get("Content-Length") or 0)
        if self.cuts and request.command == "PUT" and self.of in request.path:
            request.rfile.read(n_bytes // 2)
            self.cuts, self.n_cut = self.cuts - 1, self.n_cut + 1
            request.close_connection = True
            request.connection.close()
            return
        body = request.rfile.read(n_bytes)
        if self.refused and request.command in WRITES:
            self.send(request, 403, [("Content-Type", "application/xml")], ACCESS_DENIED)
            return
        upstream = http.client.HTTPConnection(self.upstream, timeout=30)
        headers = {key: value for key, value in request.headers.items() if key.lower() != "expect"}
        upstream.request(request.command, request.path, body, headers)
        found = upstream.getresponse()
        content = found.read()
        self.send(request, found.status, found.getheaders(), content)
        upstream.close()

    def send(self, request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        request.send_response_only(status)
        hop = ("transfer-encoding", "connection", *(() if request.command == "HEAD" else ("content-length",)))
        for key, value in headers:
            if key.lower() not in hop:
                request.send_header(key, value)
        if request.command != "HEAD":
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
