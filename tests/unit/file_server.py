"""A real HTTP server in a thread, whose paths do what a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Respond = Callable[[BaseHTTPRequestHandler], None]


class FileServer:
    """``paths`` says how each path is answered; ``asked`` are the requests so far, with their headers."""

    def __init__(self) -> None:
        self.paths: dict[str, Respond] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.released = threading.Event()  # for answers that wait
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                server.asked.append((path, {name.lower(): value for name, value in self.headers.items()}))
                try:
                    server.paths[path](self)
                except (ConnectionError, TimeoutError):
                    pass  # the client had enough

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self.port = self._server.server_address[1]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    @contextmanager
    def running(self) -> Iterator[FileServer]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()


def answers(
    body: bytes, *, status: int = 200, length: int | None = -1, sent: int | None = None, **headers: str
) -> Respond:
    """Answer with ``body``, of which ``sent`` bytes are sent; ``length`` is what is said of it: -1 the truth, None nothing."""

    def respond(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        if length is not None:
            request.send_header("Content-Length", str(len(body) if length == -1 else length))
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body[:sent])

    return respond


def with_etag(body: bytes, etag: str) -> Respond:
    """Answer 304 to who has this content, else with it."""

    def respond(request: BaseHTTPRequestHandler) -> None:
        same = request.headers.get("If-None-Match") == etag
        (answers(b"", status=304, length=None) if same else answers(body, ETag=etag))(request)

    return respond


def redirects(target: str) -> Respond:
    return answers(b"", status=302, Location=target)
