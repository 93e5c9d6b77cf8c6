"""A web server for the files of a folder, with range requests and the quirks of real servers."""

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.loopback_server import LoopbackServer


class FileServer(LoopbackServer):
    """Serves `folder`; the other fields set its quirks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.supports_head = True
        self.states_digest = False
        """Answer as the Hugging Face hub does, with a redirect that states the digest."""
        self.cut_after: int | None = None
        """Break the next connection after so many bytes of the body."""
        self.busy = 0
        """Answer 503 to so many requests."""
        self.requests: list[str] = []
        self.bytes_sent = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self, with_body=True)

            def do_HEAD(self) -> None:
                server._answer(self, with_body=False)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def _answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        self.requests.append(f"{request.command} {request.path} {request.headers.get('Range', '')}".strip())
        name = request.path.removeprefix("/").partition("?")[0]
        path = self.folder / name.removeprefix("cdn/")
        if self.busy > 0:
            self.busy -= 1
            return self._plain(request, 503)
        if not path.is_file():
            return self._plain(request, 404)
        if not with_body and not self.supports_head:
            return self._plain(request, 405)
        data = path.read_bytes()
        if self.states_digest and not name.startswith("cdn/"):
            request.send_response(302)
            request.send_header("Location", f"/cdn/{name}")
            request.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            request.send_header("Content-Length", "0")
            return request.end_headers()
        start, end = 0, len(data)
        if (requested := request.headers.get("Range")) is not None:
            first, _, last = requested.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else end, end)
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            request.send_response(200)
        request.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        request.send_header("Content-Length", str(end - start))
        request.end_headers()
        if not with_body:
            return None
        body = data[start:end]
        if self.cut_after is not None and len(body) > self.cut_after:
            body, self.cut_after = body[: self.cut_after], None
            request.close_connection = True
        self.bytes_sent += len(body)
        request.wfile.write(body)
        return None

    def _plain(self, request: BaseHTTPRequestHandler, status: int) -> None:
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.end_headers()
