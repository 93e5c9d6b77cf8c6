"""Hashes of many rows at once: sample keys of a whole batch, and 128-bit hashes of strings.

The definition of a sample key is `pipelines.sample_key`'s; this is the same for arrays, with no Python string per row.
"""

# pyarrow.compute makes its functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.sample_key import SAMPLE_KEY_BYTES, empty_digest

_HEX_DIGITS = 2 * SAMPLE_KEY_BYTES
_WORD_BYTES = 8
# Rows hashed at a time, so that they stay in the processor's cache.
_CHUNK_ROWS = 4096
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW_BYTES = np.array([(1 << 8 * count) - 1 for count in range(_WORD_BYTES)], np.uint64)


def sample_keys(urls: pa.Array, texts: pa.Array) -> np.ndarray:
    """Return the sample keys of the pairs (url, text) as uint8 [rows, 16]; null counts as the empty string."""
    urls, texts = (pc.fill_null(item, "").cast(pa.binary()) for item in (urls, texts))
    lengths = pc.binary_length(urls).to_numpy(zero_copy_only=False).astype("<u8")
    prefixes = pa.Array.from_buffers(pa.binary(8), len(urls), [None, pa.py_buffer(lengths)]).cast(pa.binary())
    hashed = pc.binary_join_element_wise(prefixes, urls, texts, b"")
    # A copy of a digest that knows its parameters costs two thirds of a new one.
    copy, digests = empty_digest().copy, []
    for start in range(0, len(hashed), _CHUNK_ROWS):
        for data in hashed[start : start + _CHUNK_ROWS].to_numpy(zero_copy_only=False).tolist():
            digest = copy()
            digest.update(data)
            digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, SAMPLE_KEY_BYTES)


def hex_keys(keys: np.ndarray) -> pa.StringArray:
    """Return keys, uint8 [rows, 16], as strings of 32 lower-case hex digits."""
    data = np.ascontiguousarray(keys).tobytes().hex().encode()
    offsets = np.arange(0, len(data) + 1, _HEX_DIGITS, dtype=np.int32)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(offsets), pa.py_buffer(data))


def parse_hex_keys(keys: pa.Array) -> np.ndarray:
    """Return keys that stand as 32 hex digits as uint8 [rows, 16]; none may be null."""
    digits = "".join(keys.to_pylist()) if len(keys) else ""
    return np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(-1, SAMPLE_KEY_BYTES)


def key_words(keys: np.ndarray) -> np.ndarray:
    """Return keys, uint8 [rows, 16], as big-endian numbers uint64 [rows, 2], which sort as the hex digits do."""
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64)


def key_ranks(words: np.ndarray, salt: str) -> np.ndarray:
    """Return the hash rank uint64 [rows] of keys uint64 [rows, 2]: a number that depends on key and salt alone."""
    first = np.uint64(int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little"))
    return _mixed(words[:, 0] + first)


def string_hashes(values: pa.Array) -> np.ndarray:
    """Return a 128-bit hash of each string as uint64 [rows, 2]; null hashes as the empty string.

    Each eight bytes, with a number of their position, go through a 64-bit finaliser (Stafford's mix 13); the first word
    is their sum, the second their sum with weights by position, each mixed with the length. Good for telling strings
    apart (two of 400 million share a hash with a chance below 2**-70), and no guard against somebody who makes strings
    that collide.
    """
    values = pc.fill_null(values, "").cast(pa.large_binary())
    offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
    data = np.frombuffer(values.buffers()[2] or b"", np.uint8)
    hashes = np.empty((len(values), 2), np.uint64)
    for row in range(0, len(values), _CHUNK_ROWS):
        chunk = offsets[row : row + _CHUNK_ROWS + 1]
        hashes[row : row + _CHUNK_ROWS] = _chunk_hashes(data[chunk[0] : chunk[-1]], chunk - chunk[0])
    return hashes


def _chunk_hashes(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    padded = np.concatenate([data, np.zeros(_WORD_BYTES, np.uint8)])
    windows = np.lib.stride_tricks.as_strided(padded[:_WORD_BYTES].view("<u8"), (len(data) + 1,), (1,))
    lengths = np.diff(offsets)
    counts = lengths // _WORD_BYTES + 1  # the last word holds 0 to 7 bytes of the string
    ends = np.cumsum(counts)
    begins = ends - counts
    index = np.arange(ends[-1]) - np.repeat(begins, counts)
    places = np.repeat(offsets[:-1], counts) + index * _WORD_BYTES
    words = windows[places].astype(np.uint64)
    words[ends - 1] &= _LOW_BYTES[lengths % _WORD_BYTES]
    weights = (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    words += weights
    words = _mixed(words)
    hashes = np.empty((len(lengths), 2), np.uint64)
    hashes[:, 0] = np.add.reduceat(words, begins)
    words *= weights | np.uint64(1)
    hashes[:, 1] = np.add.reduceat(words, begins)
    return _mixed(hashes + lengths.astype(np.uint64)[:, None])


def _mixed(words: np.ndarray) -> np.ndarray:
    """Return a bijection of 64-bit words in which every bit depends on every bit."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
