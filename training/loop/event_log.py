"""Event files that TensorBoard reads, written without it.

A file is a row of records (length, its checksum, data, its checksum), as TensorFlow's TFRecord; each holds one Event
of tensorflow/core/util/event.proto, of which scalars alone are used here.
"""

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5
_SESSION_START = 1


class EventLog:
    """One new event file in `folder`; scalars by name and step.

    With `resumed_at_step` readers forget what earlier files of the folder say of that step and later ones.
    """

    def __init__(
        self, folder: Path, *, resumed_at_step: int | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(clock()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._stream = (folder / name).open("ab")
        self._write(0, _field(3, _BYTES, b"brain.Event:2"))
        if resumed_at_step is not None:
            self._write(resumed_at_step, _field(7, _BYTES, _field(1, _VARINT, _SESSION_START)))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the values that are there, and let readers see them at once."""
        entries = [
            _field(1, _BYTES, _field(1, _BYTES, name.encode()) + _field(2, _FLOAT, value))
            for name, value in values.items()
            if value is not None
        ]
        if entries:
            self._write(step, _field(5, _BYTES, b"".join(entries)))
            self._stream.flush()

    def _write(self, step: int, what: bytes) -> None:
        event = _field(1, _DOUBLE, self._clock()) + (_field(2, _VARINT, step) if step else b"") + what
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", _masked_crc32c(data)) for data in (length, event)]
        self._stream.write(length + checksums[0] + event + checksums[1])


def _field(number: int, kind: int, value: float | bytes) -> bytes:
    """Return a protocol buffer field."""
    key = _varint(number << 3 | kind)
    if isinstance(value, bytes):
        return key + _varint(len(value)) + value
    if kind == _VARINT:
        return key + _varint(int(value))
    return key + struct.pack("<d" if kind == _DOUBLE else "<f", value)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


@cache
def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and offset as TFRecord asks."""
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
