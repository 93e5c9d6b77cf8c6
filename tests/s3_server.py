"""A real S3 server over a folder (rclone), and a proxy in front of it that breaks connections as networks do."""

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
from pipelines.storage.s3 import ObjectStore, StoreConfig, TransferConfig
from tests.loopback_server import LoopbackServer

ACCESS_KEY, SECRET_KEY = "THROUGHLINETEST", "a-secret-of-the-tests"
PART_BYTES = 5 << 20
TRANSFER = TransferConfig(connect_seconds=2, read_seconds=15, attempts=3, part_bytes=PART_BYTES, threads=3)
_MOST_BUCKETS = 200
_REMEMBERS_SECONDS = 1
"""How long rclone trusts its list of a folder; with 0 its locks block each other and it stops answering."""
_DRIPS, _DRIP_SECONDS = 20, 0.25
"""How many pieces a slow transfer comes in for a while, and the silence before each: together more than a time-out
of the tests of the client, each alone far less."""
_RECEIVE_BYTES = 1 << 18
"""The proxy's receive buffer, fixed. One that grows, to tens of MiB where the kernel allows it, lets a client whose
buffers are full send again only when a sixteenth of it is free: a slow reader then looks like one that stalls."""
_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"


class S3Server:
    """``rclone serve s3``: buckets are the folders of `folder`, objects their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self._buckets = 0
        # All before the start: the server looks at a folder once, and then not for a while.
        for number in range(1, _MOST_BUCKETS + 1):
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
            f"{_REMEMBERS_SECONDS}s",
            "--log-level",
            "ERROR",
        ]
        self._process = subprocess.Popen([*command, str(self.folder)])
        deadline = time.monotonic() + 30
        while not _answers(self.endpoint):
            assert self._process.poll() is None and time.monotonic() < deadline, "rclone serve s3 did not start"
            time.sleep(0.05)

    def revive(self) -> None:
        """Start anew where the server has stopped answering."""
        try:
            object_store(self._health, read_seconds=5, attempts=1).check()
        except ThroughlineError:
            self.__exit__()
            self._start()

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # asked to end, it would wait for its clients
        self._process.wait()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def new_bucket(self) -> str:
        """Return the name of a bucket that nobody has used."""
        self._buckets += 1
        assert self._buckets <= _MOST_BUCKETS, "more buckets are needed"
        return f"bucket-{self._buckets}"

    def notice(self) -> None:
        """Wait until the server knows what was changed in its folder behind its back."""
        time.sleep(1.5 * _REMEMBERS_SECONDS)


@dataclass
class Fault:
    """What to do to requests whose first line matches `where`, such as ``PUT .*partNumber=2``."""

    where: str
    kind: str
    """busy, stall, reset upload, corrupt upload, lose answer, reset download, cut download, corrupt download; drip
    upload and drip download, which move slowly for a while and do no harm."""
    times: int = 1
    after_bytes: int = 100_000


class FaultyProxy(LoopbackServer):
    """Passes requests on to the server, one a connection, and does to each what the next matching fault says."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        """First lines of all requests, in order."""
        self._lock = threading.Lock()
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):  # one side hangs up, as half of the faults want
                    proxy._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

            def server_bind(self) -> None:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)  # connections inherit it
                super().server_bind()

        self._server = Server(("127.0.0.1", 0), Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        with self._lock:
            self.faults, self.seen = [], []

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
        fault = self._next_fault(head.split(b"\r\n", 1)[0].decode())
        kind = fault.kind if fault else ""
        if kind == "busy":
            client.sendall(
                b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                + f"Content-Length: {len(_BUSY)}\r\n\r\n".encode()
                + _BUSY
            )
            client.shutdown(socket.SHUT_WR)
        if kind in ("busy", "stall"):
            while client.recv(1 << 16):
                pass
            return
        with socket.create_connection(("127.0.0.1", self._upstream)) as server:
            server.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + b"\r\n\r\n")
            upload = _Pipe(client, server, fault if kind.endswith("upload") else None)
            threading.Thread(target=upload.carry, args=(body,), daemon=True).start()
            answer, rest = _read_head(server)
            if kind == "lose answer":
                while server.recv(1 << 16):
                    pass
                return
            client.sendall(answer + b"\r\n\r\n")
            _Pipe(server, client, fault if kind.endswith("download") else None).carry(rest)


class _Pipe:
    """Carries bytes one way until the sender is done, or until the fault's place is reached."""

    def __init__(self, source: socket.socket, target: socket.socket, fault: Fault | None) -> None:
        self._source, self._target, self._fault = source, target, fault
        self._carried = self._num_drips = 0

    def carry(self, first: bytes) -> None:
        data = first
        with suppress(OSError):  # the other direction closes the sockets
            while True:
                if data and not self._pass(bytearray(data)):
                    return
                data = self._source.recv(1 << 16)
                if not data:
                    break
        with suppress(OSError):  # who hung up is not waited for
            self._target.shutdown(socket.SHUT_RDWR)

    def _pass(self, data: bytearray) -> bool:
        fault, start = self._fault, self._carried
        self._carried += len(data)
        if fault is not None and fault.kind.startswith("drip"):
            if self._carried > fault.after_bytes and self._num_drips < _DRIPS:
                self._num_drips += 1
                time.sleep(_DRIP_SECONDS)
        elif fault is not None and start <= fault.after_bytes < self._carried:
            offset = fault.after_bytes - start
            if fault.kind.startswith("corrupt"):
                data[offset] ^= 1
            else:
                self._target.sendall(data[:offset])
                for side in (self._source, self._target):
                    if fault.kind.startswith("reset"):
                        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        side.shutdown(socket.SHUT_RD)  # wakes who reads there, so that closing it really does
                    else:
                        side.shutdown(socket.SHUT_RDWR)
                    side.close()
                return False
        self._target.sendall(data)
        return True


def _read_head(side: socket.socket) -> tuple[bytes, bytes]:
    """Return the head of a message without its blank line, and what of the body came with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = side.recv(1 << 16)
        if not piece:
            return b"", b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


def _free_port() -> int:
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
