"""Short digests of texts: what was made of one text is told from what was made of another."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b


DIGEST_BYTES = 8


def digest_text(text: str) -> str:
    """Digest a text.

    Args:
        text: any.

    Returns:
        16 hexadecimal digits.
    """
    return blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def digest_texts(texts: Iterable[str]) -> str:
    """Digest texts in their order.

    Args:
        texts: any number.

    Returns:
        16 hexadecimal digits.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
