"""A loopback server that misbehaves like the web: raw bytes per path, so that even HTTP can be malformed."""

import asyncio
import gzip
import io
import threading
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable

import numpy as np
from PIL import Image, PngImagePlugin

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]]


def make_image(width: int = 300, height: int = 280, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return a smooth image with some structure, determined by the arguments."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small, "RGB").resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encode(make_image(), "JPEG", quality=90)
PNG = encode(make_image(), "PNG")


def response(body: bytes, status: str = "200 OK", content_type: str = "image/jpeg", **headers: str) -> bytes:
    # The server closes the connection after each response and announces it, so that clients do not reuse it.
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close"]
    if content_type:
        lines.append(f"Content-Type: {content_type}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return response(b"", status, Location=location)


def bomb_png() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in its header and hardly any bytes."""
    data = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def _gif(frames: int) -> bytes:
    images = [make_image(64, 64, seed=seed) for seed in range(frames)]
    return encode(images[0], "GIF", save_all=True, append_images=images[1:])


def _webp_animation() -> bytes:
    images = [make_image(64, 64, seed=seed) for seed in range(3)]
    return encode(images[0], "WEBP", save_all=True, append_images=images[1:])


def _text_bomb_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    return encode(make_image(64, 64), "PNG", pnginfo=info)


def bomb_gif() -> bytes:
    """A GIF whose screen is 60,000 pixels a side."""
    data = _gif(1)
    return data[:6] + (60_000).to_bytes(2, "little") * 2 + data[10:]


def _apng() -> bytes:
    images = [make_image(64, 64, seed=seed) for seed in range(3)]
    return encode(images[0], "PNG", save_all=True, append_images=images[1:])


# path -> complete response
FIXED: dict[str, bytes] = {
    "/jpeg": response(JPEG),
    "/png": response(PNG, content_type="image/png"),
    "/webp": response(encode(make_image(), "WEBP"), content_type="image/webp"),
    "/gif": response(_gif(1), content_type="image/gif"),
    "/grey.jpg": response(encode(make_image(mode="L"), "JPEG")),
    "/cmyk.jpg": response(encode(make_image(mode="CMYK"), "JPEG")),
    "/palette.png": response(encode(make_image(mode="P"), "PNG")),
    "/wrong-type": response(JPEG, content_type="text/html"),
    "/no-type": response(JPEG, content_type=""),
    "/gzipped": response(gzip.compress(JPEG), Content_Encoding="gzip"),
    "/gzip-bomb": response(gzip.compress(bytes(30_000_000)), Content_Encoding="gzip"),
    "/gzip-twice": response(gzip.compress(gzip.compress(JPEG)), Content_Encoding="gzip"),
    "/deflated": response(zlib.compress(JPEG), Content_Encoding="deflate"),
    "/zstd": response(JPEG, Content_Encoding="zstd"),
    "/two-encodings": response(JPEG, Content_Encoding="gzip, br"),
    "/gzip-lie": response(JPEG, Content_Encoding="gzip"),
    "/gzip-cut": response(gzip.compress(JPEG)[:-200], Content_Encoding="gzip"),
    "/brotli": response(JPEG, Content_Encoding="br"),
    "/404": response(b"gone", "404 Not Found"),
    "/410": response(b"gone", "410 Gone"),
    "/403": response(b"no", "403 Forbidden"),
    "/400": response(b"no", "400 Bad Request"),
    "/401": response(b"no", "401 Unauthorized", WWW_Authenticate="Basic"),
    "/407": response(b"no", "407 Proxy Authentication Required"),
    "/408": response(b"no", "408 Request Timeout"),
    "/502": response(b"<html>bad gateway</html>", "502 Bad Gateway"),
    "/504": response(b"", "504 Gateway Timeout"),
    "/300": response(b"choose", "300 Multiple Choices"),
    "/418": response(b"no", "418 I'm a teapot"),
    "/451": response(b"no", "451 Unavailable For Legal Reasons"),
    "/500": response(b"oops", "500 Internal Server Error"),
    "/503-long": response(b"later", "503 Service Unavailable", Retry_After="86400"),
    "/429": response(b"slow down", "429 Too Many Requests", Retry_After="0"),
    "/busy": response(b"slow down", "429 Too Many Requests", Retry_After="1"),
    "/204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "/206": response(JPEG[:100], "206 Partial Content"),
    "/304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "/999": response(JPEG, "999 Denied"),
    "/empty": response(b""),
    "/html-after-mark": response(b"\xef\xbb\xbf<!doctype html><title>login</title>"),
    "/html-wide": response("<html>soft 404</html>".encode("utf-16")),
    "/xml-error": response(b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "/script-in-gif": response(b"GIF89a/*<script>alert(1)</script>*/"),
    "/zip": response(b"PK\x03\x04" + bytes(60), content_type="application/zip"),
    "/heic": response(b"\x00\x00\x00\x18ftypheic" + bytes(60), content_type="image/heic"),
    "/jxl": response(b"\xff\x0a" + bytes(60), content_type="image/jxl"),
    "/blank-then-jpeg": response(b"\n" + JPEG),
    "/jpeg-then-junk": response(JPEG + b"<html>" * 50),
    "/html": response(b"\n <!DOCTYPE html><html><body>not here</body></html>"),
    "/html-comment": response(b"<!-- hi --><HTML><body>soft 404</body></html>"),
    "/text": response(b"hello, I am text"),
    "/json": response(b'{"error": "no image"}'),
    "/svg": response(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', content_type="image/svg+xml"),
    "/bmp": response(encode(make_image(32, 32), "BMP"), content_type="image/bmp"),
    "/tiff": response(encode(make_image(32, 32), "TIFF"), content_type="image/tiff"),
    "/avif": response(encode(make_image(32, 32), "AVIF"), content_type="image/avif"),
    "/pdf": response(b"%PDF-1.7 ...", content_type="application/pdf"),
    "/mp4": response(b"\x00\x00\x00\x18ftypmp42....", content_type="video/mp4"),
    "/zeros": response(bytes(5000)),
    "/truncated.jpg": response(JPEG[: len(JPEG) // 2]),
    "/truncated.png": response(PNG[: len(PNG) // 2]),
    "/header-only.jpg": response(JPEG[:20]),
    "/corrupt.png": response(PNG[:60] + bytes(100) + PNG[160:]),
    "/corrupt.webp": response(b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(8)),
    "/bomb.png": response(bomb_png()),
    "/bomb.gif": response(bomb_gif(), content_type="image/gif"),
    "/apng": response(_apng(), content_type="image/png"),
    "/pixel": response(encode(make_image(1, 1), "GIF"), content_type="image/gif"),
    "/text-bomb.png": response(_text_bomb_png()),
    "/tiny": response(encode(make_image(3, 3), "PNG")),
    "/wide": response(encode(make_image(900, 12), "PNG")),
    "/animated.gif": response(_gif(3)),
    "/animated.webp": response(_webp_animation()),
    "/noai": response(JPEG, X_Robots_Tag="noai"),
    "/noimageai": response(JPEG, X_Robots_Tag="nosnippet, NoImageAI"),
    "/noai-other": response(JPEG, X_Robots_Tag="otherbot: noai"),
    "/noai-agent": response(JPEG, X_Robots_Tag="otherbot: nofollow, testbot: noai"),
    "/noai-404": response(b"gone", "404 Not Found", X_Robots_Tag="noai"),
    "/noai-second-line": response(JPEG, X_Robots_Tag="nofollow\r\nX-Robots-Tag: NoAI"),
    "/noai-redirect": response(b"", "302 Found", Location="/jpeg", X_Robots_Tag="noai"),
    "/redirect": redirect("/redirect-2", "301 Moved Permanently"),
    "/redirect-2": redirect("/jpeg"),
    "/redirect-nowhere": response(b"", "302 Found"),
    "/redirect-file": redirect("file:///etc/passwd"),
    "/redirect-ftp": redirect("ftp://192.0.2.1/x"),
    "/redirect-metadata": redirect("http://169.254.169.254/latest/meta-data/"),
    "/redirect-private": redirect("http://10.0.0.1/x.jpg"),
    "/redirect-localhost": redirect("http://localhost:1/x.jpg"),
    "/redirect-mapped": redirect("http://[::ffff:127.0.0.1]:1/x.jpg"),
    "/redirect-self": redirect("/redirect-self", "307 Temporary Redirect"),
    "/redirect-to-404": redirect("/404", "308 Permanent Redirect"),
    "/redirect-to-html": redirect("/html", "303 See Other"),
    "/redirect-script": redirect("javascript:alert(1)"),
    "/redirect-data": redirect("data:image/png;base64,AAAA"),
    "/redirect-same-scheme": redirect("//169.254.169.254/latest/meta-data/"),
    "/redirect-loopback-6": redirect("http://[::1]:1/x.jpg"),
    "/redirect-user": redirect("http://user:secret@10.0.0.1/x.jpg"),
    "/redirect-garbage": redirect("http://[broken/"),
    "/redirect-opted-out-domain": redirect("http://cdn.artist.example/x.jpg"),
    "/redirect-opted-out-idn": redirect("http://xn--mnchen-3ya.example./x.jpg"),
    "/redirect-opted-out-url": redirect("/taken-down.jpg#top"),
    "/redirect-opted-out-spaces": redirect("/taken%20down.jpg"),
    "/redirect-denied-domain": redirect("//User@IMG.Denied.Example:81/x.jpg"),
    "/redirect-denied-url": redirect("http://pictures.example/denied.jpg"),
    "/redirect-denied-late": redirect("/redirect-denied-domain"),
    "/redirect-denied-address": redirect("http://[2606:2800:21f::1]/x.jpg"),
    "/loop-a": redirect("/loop-b"),
    "/loop-b": redirect("/loop-a"),
    "/oversized": response(bytes(2_000_000)),
    "/short-body": response(JPEG).replace(f"Content-Length: {len(JPEG)}".encode(), b"Content-Length: 999999"),
    "/not-http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "/bad-length": b"HTTP/1.1 200 OK\r\nContent-Length: minus one\r\n\r\n" + JPEG,
    "/two-lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n" + JPEG,
    "/huge-length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + JPEG,
    "/no-status": JPEG,
    "/half-a-head": b"HTTP/1.1 200 OK\r\nContent-Type: image/jp",
    "/early-hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + response(JPEG),
    "/long-header": b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 100_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "/many-headers": b"HTTP/1.1 200 OK\r\n" + b"X-A: 1\r\n" * 5000 + b"Content-Length: 0\r\n\r\n",
    "/bad-chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n",
    "/cut-chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nabc",
    "/nothing": b"",
    "/no-length": b"HTTP/1.0 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + JPEG,
    "/odd-header-bytes": b"HTTP/1.1 200 OK\r\nContent-Type: image/\xff\xfe\r\nContent-Length: "
    + str(len(JPEG)).encode()
    + b"\r\n\r\n"
    + JPEG,
}


class HostileServer:
    """Serves `FIXED`, and behaviours that need time or state, on a loopback port in a thread."""

    def __init__(self) -> None:
        self.requests = Counter[str]()
        self.concurrent = 0
        self.most_concurrent = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> "HostileServer":
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.concurrent += 1
        self.most_concurrent = max(self.most_concurrent, self.concurrent)
        try:
            first = await reader.readexactly(1)
            if first == b"\x16":  # a TLS ClientHello, which this server does not support
                writer.write(FIXED["/400"])
                return
            head = first + await reader.readuntil(b"\r\n\r\n")
            await self._answer(head.split(b" ", 2)[1].decode(), writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.concurrent -= 1
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        path = path.partition("?")[0]
        self.requests[path] += 1
        if path in FIXED:
            writer.write(FIXED[path])
        elif path.startswith("/scene/"):
            seed = int(path.rsplit("/", 1)[1])
            writer.write(response(encode(make_image(280 + seed % 50, 300, seed=seed), "JPEG")))
        elif path.startswith("/slow-scene/"):
            await asyncio.sleep(0.15)
            writer.write(response(JPEG))
        elif path.startswith("/heals/"):  # /heals/<failures>/<anything>
            failures = int(path.split("/")[2])
            writer.write(FIXED["/500"] if self.requests[path] <= failures else FIXED["/jpeg"])
        elif path == "/flaky":
            writer.write(FIXED["/500"] if self.requests[path] % 3 else FIXED["/jpeg"])
        elif path == "/flaky-reset":
            if self.requests[path] % 2:
                writer.transport.abort()
            else:
                writer.write(FIXED["/jpeg"])
        elif path == "/stall":
            await asyncio.sleep(30)
        elif path == "/stall-head":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-")
            await writer.drain()
            await asyncio.sleep(30)
        elif path == "/stall-body":
            writer.write(FIXED["/jpeg"][:400])
            await writer.drain()
            await asyncio.sleep(30)
        elif path == "/drip":
            for byte in FIXED["/jpeg"]:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)
        elif path == "/endless":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
            while True:
                writer.write(bytes(65536))
                await writer.drain()
        elif path == "/reset":
            writer.transport.abort()
        elif path.startswith("/deep/"):
            writer.write(redirect(f"/deep/{int(path.rsplit('/', 1)[1]) + 1}"))
        else:
            writer.write(FIXED["/404"])
