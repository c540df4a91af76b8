"""The two tokens of each sandbox, derived from the installation's seed and remembered while the sandbox lives."""

from __future__ import annotations

from penstock.wire import tokens


class Tokens:
    """Deriving costs 3 µs, remembering one saves it per request. Nothing here is ever shown."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._access: dict[str, str] = {}
        self._traffic: dict[str, str] = {}

    def access(self, sandbox: str) -> str:
        """What opens the guest. Call it for sandboxes in the table only: `forget` is what bounds the memory."""
        found = self._access.get(sandbox)
        if found is None:
            found = self._access[sandbox] = tokens.access_token(self._seed, sandbox)
        return found

    def traffic(self, sandbox: str) -> str:
        """What opens the user ports of a sandbox with private traffic."""
        found = self._traffic.get(sandbox)
        if found is None:
            found = self._traffic[sandbox] = tokens.traffic_token(self._seed, sandbox)
        return found

    def forget(self, sandbox: str) -> None:
        self._access.pop(sandbox, None)
        self._traffic.pop(sandbox, None)
