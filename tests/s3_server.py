"""A real S3 server over a folder (rclone), and a proxy in front of it that injects network faults."""

import re
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pipelines.core.errors import ThroughlineError
from pipelines.storage.config import StoreConfig, TransferConfig
from pipelines.storage.object_store import ObjectStore
from tests.loopback_server import LoopbackServer

ACCESS_KEY, SECRET_KEY = "THROUGHLINETEST", "a-secret-of-the-tests"
PART_BYTES = 5 << 20
TRANSFER = TransferConfig(
    connect_seconds=2, read_seconds=15, upload_seconds=15, attempts=3, part_bytes=PART_BYTES, threads=3
)
_MAX_BUCKETS = 200
_CACHE_SECONDS = 1
"""How long rclone caches the list of a folder; with 0 it deadlocks."""
_DRIPS, _DRIP_SECONDS = 20, 0.25
"""Number of chunks that a slow transfer delays, and the delay of each: in total longer than the timeouts in the tests,
each far shorter."""
_RECEIVE_BYTES = 1 << 18
"""Fixed receive buffer of the proxy. If it grows, to tens of MiB where the kernel allows that, a client whose own
buffers are full can send again only when a sixteenth of it is free, and a slow reader looks like a stalled one."""
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
_ANSWERS = {
    "busy": ("503 Slow Down", _ERROR.format("SlowDown", "Reduce your request rate")),
    "exists": ("412 Precondition Failed", _ERROR.format("PreconditionFailed", "The key exists")),
    "no conditions": ("501 Not Implemented", _ERROR.format("NotImplemented", "A header is not implemented")),
}


class S3Server:
    """``rclone serve s3``: buckets are the folders of `folder`, objects their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._buckets = 0
        # All before the start: the server caches its list of buckets.
        for number in range(1, _MAX_BUCKETS + 1):
            (folder / f"bucket-{number}").mkdir()
        self._health = self.new_bucket()

    def __enter__(self) -> Self:
        self._start()
        return self

    def _start(self) -> None:
        program = Path(sys.executable).parent / "rclone"
        assert program.exists(), "rclone is in requirements/dev.lock; run `make setup`"
        command = [str(program), "serve", "s3", "--config", "", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
        command += [
            "--addr",
            f"127.0.0.1:{self.port}",
            "--dir-cache-time",
            f"{_CACHE_SECONDS}s",
            "--log-level",
            "ERROR",
        ]
        self._process = subprocess.Popen([*command, str(self.folder)])
        deadline = time.monotonic() + 30
        while not _answers(self.endpoint):
            assert self._process.poll() is None and time.monotonic() < deadline, "rclone serve s3 did not start"
            time.sleep(0.05)

    def revive(self) -> None:
        """Restart the server if it no longer answers."""
        try:
            object_store(self._health, read_seconds=5, attempts=1).check()
        except ThroughlineError:
            self.__exit__()
            self._start()

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # SIGTERM would wait for its clients
        self._process.wait()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def new_bucket(self) -> str:
        """Return the name of an unused bucket."""
        self._buckets += 1
        assert self._buckets <= _MAX_BUCKETS, "more buckets are needed"
        return f"bucket-{self._buckets}"

    def wait_for_changes(self) -> None:
        """Wait until the server sees files that were changed in its folder directly."""
        time.sleep(1.5 * _CACHE_SECONDS)


@dataclass
class Fault:
    """A fault for requests whose first line matches `where`, such as ``PUT .*partNumber=2``."""

    where: str
    kind: str
    """busy, exists, stall, reset upload, corrupt upload, lose answer, reset download, cut download, corrupt download;
    drip upload and drip download are slow for a while and harmless."""
    times: int = 1
    after_bytes: int = 100_000


class FaultyProxy(LoopbackServer):
    """Forwards requests to the server, one per connection, and applies the next matching fault to each."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        """First lines of all requests, in order."""
        self.heads: list[str] = []
        """Request lines and headers of all requests, in order."""
        self._lock = threading.Lock()
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):  # many faults close a connection
                    proxy._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

            def server_bind(self) -> None:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)  # inherited
                super().server_bind()

        self._server = Server(("127.0.0.1", 0), Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        with self._lock:
            self.faults, self.seen, self.heads = [], [], []

    def _next_fault(self, line: str) -> Fault | None:
        with self._lock:
            self.seen.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.match(fault.where, line):
                    fault.times -= 1
                    return fault
        return None

    def _serve(self, client: socket.socket) -> None:
        head, body = _read_head(client)
        if not head:
            return
        self.heads.append(head.decode())
        fault = self._next_fault(head.split(b"\r\n", 1)[0].decode())
        kind = fault.kind if fault else ""
        if kind in _ANSWERS:
            status, body = _ANSWERS[kind]
            client.sendall(
                f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            client.shutdown(socket.SHUT_WR)
        if kind in _ANSWERS or kind == "stall":
            while client.recv(1 << 16):
                pass
            return
        with socket.create_connection(("127.0.0.1", self._upstream)) as server:
            server.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + b"\r\n\r\n")
            upload = _Pipe(client, server, fault if kind.endswith("upload") else None)
            threading.Thread(target=upload.forward, args=(body,), daemon=True).start()
            answer, rest = _read_head(server)
            if kind == "lose answer":
                while server.recv(1 << 16):
                    pass
                return
            if b"\r\ncontent-range:" in answer.lower():
                answer = answer.replace(b" 200 OK", b" 206 Partial Content", 1)  # rclone answers ranges with 200
            client.sendall(answer + b"\r\n\r\n")
            _Pipe(server, client, fault if kind.endswith("download") else None).forward(rest)


class _Pipe:
    """Forwards bytes in one direction until the sender is done or the fault strikes."""

    def __init__(self, source: socket.socket, target: socket.socket, fault: Fault | None) -> None:
        self._source, self._target, self._fault = source, target, fault
        self._forwarded = self._num_drips = 0

    def forward(self, first: bytes) -> None:
        data = first
        with suppress(OSError):  # the other direction closes the sockets
            while True:
                if data and not self._pass(bytearray(data)):
                    return
                data = self._source.recv(1 << 16)
                if not data:
                    break
        with suppress(OSError):  # the target may have closed already
            self._target.shutdown(socket.SHUT_RDWR)

    def _pass(self, data: bytearray) -> bool:
        fault, start = self._fault, self._forwarded
        self._forwarded += len(data)
        if fault is not None and fault.kind.startswith("drip"):
            if self._forwarded > fault.after_bytes and self._num_drips < _DRIPS:
                self._num_drips += 1
                time.sleep(_DRIP_SECONDS)
        elif fault is not None and start <= fault.after_bytes < self._forwarded:
            offset = fault.after_bytes - start
            if fault.kind.startswith("corrupt"):
                data[offset] ^= 1
            else:
                self._target.sendall(data[:offset])
                for side in (self._source, self._target):
                    if fault.kind.startswith("reset"):
                        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        side.shutdown(socket.SHUT_RD)  # wakes its reader, so that close takes effect
                    else:
                        side.shutdown(socket.SHUT_RDWR)
                    side.close()
                return False
        self._target.sendall(data)
        return True


def _read_head(side: socket.socket) -> tuple[bytes, bytes]:
    """Return a message's head without its blank line, and the part of the body that was received with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = side.recv(1 << 16)
        if not chunk:
            return b"", b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def config_of(bucket: str, **changes: Any) -> StoreConfig:
    return StoreConfig(url=f"s3://{bucket}/team/runs", transfer=TRANSFER.model_copy(update=changes))


def object_store(bucket: str, **changes: Any) -> ObjectStore:
    return ObjectStore(config_of(bucket, **changes))


def boto_client(server: S3Server) -> Any:
    """Return another client, which asks the server directly."""
    from boto3.session import Session

    return Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1").client("s3", endpoint_url=server.endpoint)


def unfinished_uploads(server: S3Server, bucket: str) -> list[str]:
    """Return the keys of the multipart uploads that were neither completed nor aborted."""
    from botocore.exceptions import ClientError

    try:
        answer = boto_client(server).list_multipart_uploads(Bucket=bucket)
    except ClientError as error:
        assert error.response["Error"]["Code"] == "NoSuchUpload"  # how rclone answers for an empty list
        return []
    return [upload["Key"] for upload in answer.get("Uploads", [])]
