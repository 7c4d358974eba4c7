"""Serve one page to this machine alone, on the first free port."""

from __future__ import annotations

import errno
import http.server
import os
from http import HTTPStatus

from probattn.errors import InputError

__all__ = ["serve_page"]

_TRIES = 20


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # On Windows this would share a port in use; elsewhere it only shortens the wait after a stop.
    allow_reuse_address = os.name != "nt"


def serve_page(page: str, port: int) -> http.server.ThreadingHTTPServer:
    """Create a server of one page, bound to 127.0.0.1; ``serve_forever`` starts it, ``server_close`` ends it.

    Args:
        page: HTML to serve.
        port: first port to try; if it is in use, the next free one of twenty. 0 selects any free port.

    Returns:
        The server, with its port as ``server_port``.

    Raises:
        InputError: no port could be bound.

    Example:
        >>> server = serve_page("<!doctype html><title>a page</title>", 0)
        >>> server.server_address[0]
        '127.0.0.1'
        >>> server.server_close()
    """
    content = page.encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_GET(self) -> None:
            self._answer(content)

        def _answer(self, body: bytes) -> None:
            if self.path.partition("?")[0] not in ("/", "/index.html", "/explorer.html"):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing, since the terminal belongs to the user."""

    last = min(port + _TRIES, 65536) if port else 1
    for candidate in range(port, last):
        try:
            return _Server(("127.0.0.1", candidate), Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(
                    f"--port {port}: cannot listen on 127.0.0.1 ({error.strerror}); name another, or 0 for any."
                ) from None
    raise InputError(f"--port {port}: in use, like all up to {last - 1}; name another, or 0 for any free one.")
