"""Base of the test servers: serve from a thread inside a with block."""

import socketserver
import threading
from typing import Self


class LoopbackServer:
    """A context manager that serves; subclasses create the server."""

    _server: socketserver.TCPServer

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
