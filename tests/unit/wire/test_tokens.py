"""Tokens and signatures; the SDK's own signing function is the oracle."""

from __future__ import annotations

import re

import pytest
from e2b.sandbox.signature import get_signature

from penstock.wire import tokens

SEED = bytes(range(32))


def test_tokens_depend_on_seed_sandbox_and_purpose_only() -> None:
    assert tokens.access_token(SEED, "ia") == tokens.access_token(SEED, "ia")
    different = {
        tokens.access_token(SEED, "ia"),
        tokens.access_token(SEED, "ib"),
        tokens.traffic_token(SEED, "ia"),
        tokens.access_token(SEED[::-1], "ia"),
    }
    assert len(different) == 4


def test_keys_are_what_old_sdks_accept() -> None:
    key = tokens.new_key()
    assert re.fullmatch(r"e2b_[0-9a-f]{40}", key)
    assert tokens.new_key() != key
    assert key[4:] not in tokens.hash_key(key)


@pytest.mark.parametrize(("operation", "user"), [("read", "user"), ("write", ""), ("read", "ü:x")])
@pytest.mark.parametrize("path", ["/home/user/a b", "rel", "/ä/ö", ""])
def test_our_signatures_are_the_sdks(path: str, operation: str, user: str) -> None:
    theirs = get_signature(path, operation, user, "token", None)
    assert tokens.sign(path, operation, user, "token") == theirs["signature"]
    timed = get_signature(path, operation, user, "token", 60)
    assert tokens.sign(path, operation, user, "token", timed["expiration"]) == timed["signature"]


def test_a_signature_is_compared_before_its_expiry() -> None:
    def check(signature: str, expires: int | None) -> str | None:
        return tokens.check(
            signature, path="/a", operation="read", username="u", token="t", expires=expires, now=1000.0
        )

    good = tokens.sign("/a", "read", "u", "t", 2000)
    late = tokens.sign("/a", "read", "u", "t", 999)
    assert check(good, 2000) is None
    assert check(late, 999) == "signature is already expired"
    assert check(late, 2000) == "invalid signature"
    assert check("v1_wrong", 999) == "invalid signature"
    assert check("ä\udcff", None) == "invalid signature"
    assert check(tokens.sign("/a", "write", "u", "t"), None) == "invalid signature"
