"""Decoders that crash or hang on demand, in a module that worker processes can import."""

import gc
import os
import signal
import struct
from multiprocessing.queues import SimpleQueue

from pipelines.download.config import ImageTransform
from pipelines.download.decode import DecodeOutcome, decode
from pipelines.download.status import FetchStatus


def decode_or_misbehave(body: bytes, transform: ImageTransform) -> DecodeOutcome:
    if body == b"die":
        os.abort()
    if body == b"end the server":
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    if body == b"die while handing over":
        (results,) = (item for item in gc.get_objects() if isinstance(item, SimpleQueue))
        os.write(results._writer.fileno(), struct.pack("!i", 1000) + b"half of the message")
        os.abort()
    if body == b"hang":
        while True:  # busy, as a decoder in an endless loop is
            pass
    return decode(body, transform)


def decode_to_much(body: bytes, transform: ImageTransform) -> DecodeOutcome:
    """Return so much data that a worker spends most of its time sending it."""
    return DecodeOutcome(status=FetchStatus.OK, image=bytes(8 << 20))


class UnloadableDecoder:
    """Ends any process that unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (1,)

    def __call__(self, body: bytes, transform: ImageTransform) -> DecodeOutcome:
        raise AssertionError("no process can load it")
