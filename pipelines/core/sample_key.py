"""The sample key: the identity of one image-text pair, from ingest to score.

A key is 128 bits. Tables, tar members and JSON hold it as 32 hex digits, tensors as 16 bytes. This module defines it;
`pipelines.laion.hashes` computes the same keys for whole arrays, and sorts them as pairs of 64-bit words.
"""

import hashlib

SAMPLE_KEY_BYTES = 16


def empty_digest() -> hashlib.blake2b:
    """Return the hash object of a sample key before any input."""
    return hashlib.blake2b(digest_size=SAMPLE_KEY_BYTES, person=b"throughline-key1")


def sample_key(url: str, alt_text: str) -> str:
    """Return the 128-bit key of the pair (url, alt_text) as 32 lower-case hex digits.

    The hash covers the length of the URL, so that pairs with equal concatenations have different keys.
    """
    url_bytes = url.encode("utf-8", "surrogatepass")
    digest = empty_digest()
    digest.update(len(url_bytes).to_bytes(8, "little"))
    digest.update(url_bytes)
    digest.update(alt_text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
