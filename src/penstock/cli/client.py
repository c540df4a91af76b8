"""A small client of our own API: REST for sandboxes and keys, Connect for commands. Used by the CLI alone."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any, Final

import httpx

from penstock.cli.profile import Profile
from penstock.core.errors import Kind, PenstockError
from penstock.wire import connect

REQUEST_S: Final = 75.0  # above the server's own bound on a create


KINDS: Final = {
    400: Kind.INVALID,
    401: Kind.UNAUTHENTICATED,
    403: Kind.FORBIDDEN,
    404: Kind.NOT_FOUND,
    409: Kind.CONFLICT,
    410: Kind.NOT_FOUND,
    429: Kind.EXHAUSTED,
    501: Kind.UNSUPPORTED,
    502: Kind.UNAVAILABLE,
    503: Kind.UNAVAILABLE,
    504: Kind.DEADLINE,
}


class CallFailed(PenstockError):
    """The API or the guest refused. The message is the server's, and the kind (our exit code) is that of its status."""

    code = "call_failed"

    def __init__(self, what: str, *, kind: Kind = Kind.INTERNAL, which: str = "", why: str = "", now: str = "") -> None:
        super().__init__(what, which=which, why=why, now=now)
        self.kind = kind  # type: ignore[misc]  # of this one, where other errors have one per class


class CommandRefused(CallFailed):
    """The guest did not start the command: it is not there (NOT_FOUND), or may not be run (FORBIDDEN)."""


class Client:
    """One installation, synchronously. Close with `close()` or use as a context manager."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        headers = {"X-API-Key": profile.api_key}
        self._api = httpx.Client(base_url=profile.api_url, headers=headers, timeout=REQUEST_S)
        self._guest = httpx.Client(base_url=profile.sandbox_url, timeout=httpx.Timeout(10.0, read=None))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._api.close()
        self._guest.close()

    # ---- REST -------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, *, admin: bool = False, **kwargs: Any) -> httpx.Response:
        """One request. Raises CallFailed with the server's message, or when nobody answers."""
        if admin and self.profile.admin_token:
            kwargs.setdefault("headers", {})["X-Admin-Token"] = self.profile.admin_token
        try:
            response = self._api.request(method, path, **kwargs)
        except httpx.TransportError as error:
            raise _unreachable(self.profile.api_url, error) from error
        return _checked(response)

    def tail(
        self, path: str, *, params: dict[str, str], last_id: str = "", quiet_s: float
    ) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Server-sent events as (id, data), as the operator if we may; data is None for an id alone.

        Ends when the stream does, also when it breaks or says nothing for `quiet_s`: come back with the last id.
        Raises CallFailed when it is refused, or when nobody answers.
        """
        headers = {"Last-Event-ID": last_id} if last_id else {}
        if self.profile.admin_token:
            headers["X-Admin-Token"] = self.profile.admin_token
        timeout = httpx.Timeout(10.0, read=quiet_s)
        began = False
        try:
            with self._api.stream("GET", path, params=params, headers=headers, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                    _checked(response)
                began = True
                yield from _server_sent(response.iter_lines())
        except httpx.TransportError as error:
            if not began:
                raise _unreachable(self.profile.api_url, error) from error

    def sandbox(self, sandbox: str) -> dict[str, Any]:
        body: dict[str, Any] = self.call("GET", f"/sandboxes/{sandbox}").json()
        return body

    # ---- the guest --------------------------------------------------------------------------------------

    def guest_headers(self, sandbox: dict[str, Any], user: str | None) -> dict[str, str]:
        headers = {"E2b-Sandbox-Id": sandbox["sandboxID"], "E2b-Sandbox-Port": "49983"}
        if sandbox.get("envdAccessToken"):
            headers["X-Access-Token"] = sandbox["envdAccessToken"]
        if user:
            headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:".encode()).decode()
        return headers

    def unary(self, sandbox: dict[str, Any], method: str, message: dict[str, Any], user: str | None = None) -> Any:
        with self._reaching(sandbox):
            response = self._guest.post(f"/{method}", json=message, headers=self.guest_headers(sandbox, user))
        return _checked(response).json()

    def start(self, sandbox: dict[str, Any], message: dict[str, Any], user: str | None) -> Iterator[dict[str, Any]]:
        """Run a process; yields its events (`start`, `data`, `end`). Closing the iterator leaves it running."""
        headers = self.guest_headers(sandbox, user) | {
            "Content-Type": "application/connect+json",
            "Connect-Protocol-Version": "1",
            "Keepalive-Ping-Interval": "50",
        }
        body = connect.frame(json.dumps(message).encode())
        with (
            self._reaching(sandbox),
            self._guest.stream("POST", "/process.Process/Start", content=body, headers=headers) as response,
        ):
            if response.status_code != 200:
                response.read()
                _checked(response)
            yield from _events(response)

    def download(self, sandbox: dict[str, Any], path: str, user: str | None) -> Iterator[bytes]:
        params = {"path": path} | ({"username": user} if user else {})
        headers = self.guest_headers(sandbox, None) | {"Accept-Encoding": "identity"}
        with self._reaching(sandbox), self._guest.stream("GET", "/files", params=params, headers=headers) as response:
            if response.status_code != 200:
                response.read()
                _checked(response)
            yield from response.iter_bytes(256 * 1024)

    def upload(self, sandbox: dict[str, Any], path: str, chunks: Iterator[bytes], user: str | None) -> Any:
        params = {"path": path} | ({"username": user} if user else {})
        headers = self.guest_headers(sandbox, None) | {"Content-Type": "application/octet-stream"}
        with self._reaching(sandbox):
            response = self._guest.post("/files", params=params, headers=headers, content=chunks)
        return _checked(response).json()

    @contextlib.contextmanager
    def _reaching(self, sandbox: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise CallFailed(
                "the connection to the sandbox broke", kind=Kind.UNAVAILABLE, which=sandbox["sandboxID"], why=str(error)
            ) from error


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    reader = connect.FrameReader()
    for chunk in response.iter_raw():
        for flags, payload in reader.feed(chunk):
            message = json.loads(payload or b"{}")
            if flags & connect.END_STREAM:
                error = message.get("error")
                if error:
                    code = error.get("code", "internal")
                    raise CommandRefused(error.get("message", code), kind=_kind_of(code))
                return
            yield message["event"]
    raise CallFailed("the sandbox ended while the command ran")


def _server_sent(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    id, data = "", ""
    for line in lines:
        name, _, text = line.partition(": ")
        if name == "id":
            id = text
        elif name == "data":
            data += text
        elif not line and (id or data):
            yield id, json.loads(data) if data else None
            id, data = "", ""


def _kind_of(word: str) -> Kind:
    status = next((code.status for code in connect.Code if code.word == word), 500)
    return KINDS.get(status, Kind.INTERNAL)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        message = response.json().get("message", response.text)
    except ValueError:
        message = response.text or response.reason_phrase
    raise CallFailed(message, kind=KINDS.get(response.status_code, Kind.INTERNAL))


def _unreachable(url: str, error: Exception) -> CallFailed:
    return CallFailed(
        "nobody answers", kind=Kind.UNAVAILABLE, which=url, why=str(error), now="is the daemon running? (penstock up)"
    )
