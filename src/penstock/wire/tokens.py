"""Secrets and signatures: API keys, the two tokens of a sandbox, signed file URLs.

A sandbox's tokens are derived from the installation's seed and its id, so that nothing secret is stored and every
process that holds the seed agrees. Comparisons take constant time. Source of the signature: E2B's file URLs.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from typing import Final

KEY_PREFIX: Final = "e2b_"  # old SDKs refuse a key that is not e2b_ and hexadecimal digits
KEY_HEX_DIGITS: Final = 40
SIGNATURE_PREFIX: Final = "v1_"
SIGNATURE_EXPIRED: Final = "signature is already expired"  # the SDKs compare these words
SIGNATURE_INVALID: Final = "invalid signature"


def access_token(seed: bytes, sandbox_id: str) -> str:
    """What opens the guest of `sandbox_id` (header X-Access-Token): 64 hexadecimal digits."""
    return _derive(seed, "access", sandbox_id)


def traffic_token(seed: bytes, sandbox_id: str) -> str:
    """What opens the user ports of a sandbox with private traffic (header e2b-traffic-access-token)."""
    return _derive(seed, "traffic", sandbox_id)


def new_key() -> str:
    """A fresh API key; 160 bits from the kernel."""
    return KEY_PREFIX + secrets.token_hex(KEY_HEX_DIGITS // 2)


def hash_key(key: str) -> str:
    """What is stored of a key. The keys are random, so one SHA-256 is enough: nothing to guess slowly."""
    return hashlib.sha256(key.encode()).hexdigest()


def sign(path: str, operation: str, username: str, token: str, expires: int | None = None) -> str:
    """Signature of a file URL. `operation` is `read` or `write`; `path` exactly as in the query; `expires` Unix s."""
    text = f"{path}:{operation}:{username}:{token}"
    if expires is not None:
        text += f":{expires}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return SIGNATURE_PREFIX + base64.b64encode(digest).rstrip(b"=").decode()


def check(
    signature: str, *, path: str, operation: str, username: str, token: str, expires: int | None, now: float
) -> str | None:
    """None when `signature` holds at wall time `now`, else why not. Compared first, then checked for expiry."""
    if not same(signature, sign(path, operation, username, token, expires)):
        return SIGNATURE_INVALID
    if expires is not None and expires < now:
        return SIGNATURE_EXPIRED
    return None


def same(given: str, wanted: str) -> bool:
    """Equality in constant time; any text, also beyond ASCII."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode("utf-8", "surrogatepass"))


def _derive(seed: bytes, purpose: str, sandbox_id: str) -> str:
    return hmac.new(seed, f"penstock:{purpose}:{sandbox_id}".encode(), hashlib.sha256).hexdigest()
