"""What people ask of a sandbox through the ingress, and what the answers must say.

Every body from inside names its sandbox, and what was sent comes back; so an answer of another sandbox, a lost byte
and a doubled one all show.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote

import msgspec

from penstock.sim.caller import ANSWER_S, RESET, Answer, Caller, Hung, request
from penstock.sim.echo import PORT, RUDE_PORT, signature
from penstock.sim.judge import Judge, Moment
from penstock.sim.net import Net
from penstock.wire import connect, tokens
from penstock.wire.routing import GUEST_PORT

INGRESS: Final = "ingress"  # its address
SIZES: Final = (0, 1, 50, 5_000, 150_000)
Fields = tuple[tuple[str, str], ...]
STREAM_TYPE: Final = connect.STREAM_TYPE.decode()
NOBODY: Final = "i00000000000000000000"


class Setting(Protocol):
    """What a visit needs of its world."""

    net: Net
    judge: Judge

    def blame(self, what: str) -> None: ...
    def say(self, what: str, **facts: object) -> None: ...
    def wall(self) -> float: ...


class Visit:
    """One connection's worth of requests to one sandbox. `home` is a folder of its own inside."""

    def __init__(
        self, world: Setting, rng: random.Random, sandbox: str, home: Path, *, seed: bytes, private: bool
    ) -> None:
        self._world, self._rng, self._sandbox, self._home = world, rng, sandbox, home
        self._private = private
        self._access = tokens.access_token(seed, sandbox)
        self._traffic = tokens.traffic_token(seed, sandbox)
        self._opened = world.judge.moment(sandbox)
        self._caller = Caller(world.net, INGRESS, random.Random(rng.getrandbits(64)))

    async def go(self) -> None:
        """Connect, ask, hang up."""
        ask: Callable[[], Awaitable[None]] = self._rng.choice(
            (
                self.echoes, self.echoes, self.pipelined, self.tunnel, self.rude_port, self.closed_port,
                self.small_talk, self.files, self.parts, self.folders, self.watch, self.story, self.signed,
                self.without_token, self.nonsense, self.breaks_off, self.ingress_itself,
            )
        )  # fmt: skip
        self._world.say("visit", of=self._sandbox, does=ask.__name__)
        if not await self._connect():
            return
        try:
            await ask()
        except Hung as hung:
            self._world.blame(f"{ask.__name__} of {self._sandbox}: {hung} within {ANSWER_S:g} s")
        finally:
            self._caller.hang_up()

    # ---- user ports

    async def echoes(self) -> None:
        """Some requests one after the other; at the end, nothing may follow the last answer."""
        for _ in range(self._rng.randint(1, 4)):
            raw, method, body = self._echo_request()
            answer = await self._ask("echo", raw, method.encode())
            self._check_echo(answer, method, body)
            if not answer.keep:
                return
            await asyncio.sleep(self._rng.choice((0.0, 0.0, 0.5, 4.99, 5.01)))
        if self._moment().ingress and not await self._caller.ended():
            self._world.blame(f"more than one answer to a request of {self._sandbox}, or no end")

    async def pipelined(self) -> None:
        asked = [self._echo_request() for _ in range(3)]
        then = self._moment()
        number = self._world.judge.begin("pipelined", then)
        try:
            await self._caller.send(b"".join(raw for raw, _, _ in asked))
            for _, method, body in asked:
                answer = await self._caller.receive(method.encode())
                self._judge("pipelined", then, answer)
                self._check_echo(answer, method, body)
                if not answer.keep:
                    return
        finally:
            self._world.judge.done(number)

    async def tunnel(self) -> None:
        fields = (*self._aim(PORT), ("Connection", "Upgrade"), ("Upgrade", "echo"))
        then = self._moment()
        answer = await self._ask("tunnel", request("GET", "/ws", fields), asked_for_it=True)
        if answer.status != 101:
            self._judge("tunnel", then, answer)
            return
        sent = self._rng.randbytes(self._rng.choice(SIZES))
        wanted = signature(self._sandbox) + sent
        number = self._world.judge.begin("tunnel", then)
        try:
            await self._caller.send(sent)
            got = bytearray()
            while len(got) < len(wanted) and (data := await self._read()):
                got += data
        finally:
            self._world.judge.done(number)
        if got != wanted[: len(got)]:
            self._world.blame(f"a tunnel of {self._sandbox} changed what went through it")
        self._judge("tunnel", then, Answer(status=200, whole=True) if len(got) == len(wanted) else RESET)

    async def rude_port(self) -> None:
        for _ in range(2):
            raw = request("GET", "/", self._aim(RUDE_PORT))
            answer = await self._ask("rude port", raw, asked_for_it=True)
            if answer.status == 200 and answer.whole:
                self._check_echo(answer, "GET", b"")
            if not answer.keep:
                return

    async def closed_port(self) -> None:
        answer = await self._ask("closed port", request("GET", "/", self._aim(9)), asked_for_it=True)
        if answer.status not in (0, 502, 503, 429):
            self._world.blame(f"a port nobody listens on answered {answer}")

    async def without_token(self) -> None:
        """User ports that are private, and the guest, ask for their tokens."""
        fields: Fields = (("Host", f"{PORT}-{self._sandbox}.example.org"),)
        wanted = (403,) if self._private else (200,)
        self._expect(await self._ask("no token", request("GET", "/", fields), asked_for_it=True), wanted)
        fields = (("Host", f"{GUEST_PORT}-{self._sandbox}.example.org"), ("X-Access-Token", "wrong"))
        self._expect(await self._ask("wrong token", request("GET", "/envs", fields), asked_for_it=True), (401,))

    # ---- the guest

    async def small_talk(self) -> None:
        await self._guest("GET", "/health", accept=(204,))
        answer = await self._guest("GET", "/envs")
        if answer.status == 200 and answer.whole and self._sandbox.encode() not in answer.body:
            self._world.blame(f"/envs of {self._sandbox} is another's: {answer.body[:200]!r}")
        await self._guest("GET", "/metrics")
        await self._guest("HEAD", "/health", accept=(204,))

    async def files(self) -> None:
        """A file goes in and comes back; two are joined."""
        paths = [str(self._home / f"file{number}") for number in range(2)]
        bodies = [signature(self._sandbox) + self._rng.randbytes(self._rng.choice(SIZES)) for _ in paths]
        for path, body in zip(paths, bodies, strict=True):
            chunks = (1, 700) if self._rng.random() < 0.3 else ()
            answer = await self._guest(
                "POST", f"/files?path={quote(path)}", body, kind="application/octet-stream", chunks=chunks
            )
            if answer.status != 200:
                return
        await self._download(paths[0], bodies[0])
        joined = str(self._home / f"joined{self._rng.randrange(10)}")
        order = json.dumps({"source_paths": paths, "destination": joined}).encode()
        if (await self._guest("POST", "/files/compose", order)).status == 200:
            await self._download(joined, b"".join(bodies))

    async def parts(self) -> None:
        path = str(self._home / "parts")
        content = signature(self._sandbox) + self._rng.randbytes(self._rng.choice(SIZES)).hex().encode()
        body = (
            f'--sim\r\nContent-Disposition: form-data; name="file"; filename="{path}"\r\n\r\n'.encode()
            + content
            + b"\r\n--sim--\r\n"
        )
        answer = await self._guest("POST", "/files", body, kind="multipart/form-data; boundary=sim")
        if answer.status == 200:
            await self._download(path, content)

    async def folders(self) -> None:
        path = str(self._home / f"folder{self._rng.randrange(1_000_000)}")
        made = await self._call("MakeDir", path=path)
        if made is None or made["entry"]["path"] != path:
            return
        await self._call("Stat", path=path)
        if await self._call("Move", source=path, destination=f"{path}.moved") is None:
            return
        listed = await self._call("ListDir", path=str(self._home), depth=2)
        names = [entry["name"] for entry in listed["entries"]] if listed is not None else []
        if listed is not None and f"{Path(path).name}.moved" not in names:
            self._world.blame(f"{path} was moved and is not listed: {names}")
        await self._call("Remove", path=f"{path}.moved")

    async def watch(self) -> None:
        path = str(self._home / f"watched{self._rng.randrange(1_000_000)}")
        if await self._call("MakeDir", path=path) is None:
            return
        made = await self._call("CreateWatcher", path=path, recursive=True)
        if made is None or await self._call("MakeDir", path=f"{path}/inner") is None:
            return
        events = await self._call("GetWatcherEvents", watcherId=made["watcherId"])
        if events is not None and not any(event["name"] == "inner" for event in events["events"]):
            self._world.blame(f"a watcher of {self._sandbox} missed a folder: {events}")
        await self._call("RemoveWatcher", watcherId=made["watcherId"])

    async def story(self) -> None:
        """A streaming call, read to its end or left in the middle."""
        body = connect.frame(json.dumps({"lines": self._rng.randint(0, 20)}).encode())
        if self._rng.random() < 0.3:
            await self._caller.send(self._guest_request("POST", "/process.Process/Start", body, STREAM_TYPE))
            await asyncio.sleep(self._rng.uniform(0.0, 2.0))
            return
        answer = await self._guest("POST", "/process.Process/Start", body, kind=STREAM_TYPE)
        if answer.status == 200 and answer.whole:
            said = [json.loads(payload) for _, payload in connect.FrameReader().feed(answer.body)]
            texts = [event["event"]["data"]["stdout"] for event in said if "data" in event.get("event", {})]
            if said[-1] != {} or not all(text.startswith(signature(self._sandbox).decode()) for text in texts):
                self._world.blame(f"a stream of {self._sandbox} is not what was told there: {said}")

    async def signed(self) -> None:
        """A signed URL that names no sandbox finds its own."""
        path, body = str(self._home / "signed"), signature(self._sandbox)
        answer = await self._guest("POST", f"/files?path={quote(path)}", body, kind="application/octet-stream")
        if answer.status != 200:
            return
        expires = int(self._world.wall()) + 1_000
        mark = tokens.sign(path, "read", "user", self._access, expires)
        target = f"/files?path={quote(path)}&username=user&signature={quote(mark)}&signature_expiration={expires}"
        then = self._moment()
        answer = await self._ask("signed URL", request("GET", target, (("Host", "localhost"),)), asked_for_it=True)
        if answer.status == 200 and answer.whole and answer.body != body:
            self._world.blame(f"a signed URL of {self._sandbox} gave {answer.body[:100]!r}")
        if answer.status == 401 and then.feed and then == self._moment():
            self._world.blame(f"a signed URL of {self._sandbox} was not recognised")

    # ---- the ingress

    async def nonsense(self) -> None:
        """What is no request is refused, and never reaches a sandbox."""
        raw = self._rng.choice(
            (
                b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
                b"GET / HTTP/1.1\nHost: a\n\n",
                b"\x16\x03\x01\x02\x00",
                request("GET", "/", (("Host", "localhost"),)),
                request("GET", "/init", self._aim(GUEST_PORT)),
                request("GET", "/", (("Host", f"{PORT}-{NOBODY}.example.org"),)),
            )
        )
        answer = await self._ask("nonsense", raw, asked_for_it=True, aimed=False)
        self._expect(answer, (400, 404, 408, 502))

    async def breaks_off(self) -> None:
        """Leaves in the middle of a head, a body, or an answer."""
        raw, _, _ = self._echo_request()
        await self._caller.send(raw[: self._rng.randrange(len(raw))])
        await asyncio.sleep(self._rng.choice((0.0, 0.01, 0.3, 12.0)))
        if self._rng.random() < 0.5 and not self._caller.writer.is_closing():
            self._caller.writer.close()
            await asyncio.sleep(0.1)

    async def ingress_itself(self) -> None:
        for path in ("/health", "/metrics"):
            answer = await self._ask(
                path, request("GET", path, (("Host", "localhost"),)), asked_for_it=True, aimed=False
            )
            self._expect(answer, (200,))

    # ---- private parts

    async def _connect(self) -> bool:
        then = self._opened = self._world.judge.moment(self._sandbox)
        try:
            await self._caller.open()
        except ConnectionRefusedError:
            self._world.judge.refused("a visit", then)
            return False
        return True

    def _moment(self) -> Moment:
        """Now, but for the connection: that is as old as it is."""
        now, opened = self._world.judge.moment(self._sandbox), self._opened
        return msgspec.structs.replace(now, ingress=opened.ingress, cuts=opened.cuts)

    async def _ask(
        self, what: str, raw: bytes, method: bytes = b"GET", *, asked_for_it: bool = False, aimed: bool = True
    ) -> Answer:
        """Not `aimed`: the request is none of the sandbox's, and outlives it."""
        then = self._moment()
        number = self._world.judge.begin(what, then if aimed else None)
        try:
            await self._caller.send(raw)
            answer = await self._caller.receive(method)
        finally:
            self._world.judge.done(number)
        self._judge(what, then, answer, asked_for_it=asked_for_it, aimed=aimed)
        return answer

    def _judge(
        self, what: str, then: Moment, answer: Answer, *, asked_for_it: bool = False, aimed: bool = True
    ) -> None:
        self._world.say("answer", of=self._sandbox, to=what.replace(" ", "_"), status=answer)
        self._world.judge.judge(what, self._sandbox, then, answer, asked_for_it=asked_for_it, aimed=aimed)

    async def _read(self) -> bytes:
        return await self._caller.read()

    def _expect(self, answer: Answer, statuses: tuple[int, ...]) -> None:
        """Refusals for want of a sandbox, of room, or of the connection are judged elsewhere."""
        if answer.status and answer.status not in (*statuses, 502, 503, 429):
            self._world.blame(f"{self._sandbox} answered {answer}, wanted {statuses}: {answer.body[:200]!r}")

    def _aim(self, port: int) -> Fields:
        token = (("E2b-Traffic-Access-Token", self._traffic),) if self._private else ()
        if self._rng.random() < 0.5:
            return (("Host", f"{port}-{self._sandbox}.example.org"), *token)
        return (("Host", "localhost"), ("E2b-Sandbox-Id", self._sandbox), ("E2b-Sandbox-Port", str(port)), *token)

    def _echo_request(self) -> tuple[bytes, str, bytes]:
        """(request, method, body)"""
        method = self._rng.choice(("GET", "GET", "HEAD", "POST", "PUT"))
        body = self._rng.randbytes(self._rng.choice(SIZES)) if method in ("POST", "PUT") else b""
        chunks = (3, 300) if body and self._rng.random() < 0.4 else ()
        return request(method, "/echo", self._aim(PORT), body, chunks=chunks), method, body

    def _check_echo(self, answer: Answer, method: str, body: bytes) -> None:
        if answer.status != 200 or not answer.whole or method == "HEAD":
            return
        if answer.body != signature(self._sandbox) + body:
            self._world.blame(f"{self._sandbox} echoed {answer.body[:100]!r} ({len(answer.body)} bytes) to {method}")

    def _guest_request(self, method: str, target: str, body: bytes, kind: str, chunks: tuple[int, ...] = ()) -> bytes:
        fields = (*self._aim(GUEST_PORT), ("X-Access-Token", self._access), ("Content-Type", kind))
        return request(method, target, fields, body, chunks=chunks)

    async def _guest(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        kind: str = "application/json",
        chunks: tuple[int, ...] = (),
        accept: tuple[int, ...] = (200,),
    ) -> Answer:
        raw = self._guest_request(method, target, body, kind, chunks)
        answer = await self._ask(f"{method} {target.partition('?')[0]}", raw, method.encode())
        if not answer.keep:
            # The next request of this visit needs another connection.
            self._caller.hang_up()
            if not await self._connect():
                return RESET
        self._expect(answer, accept)
        return answer

    async def _download(self, path: str, body: bytes) -> None:
        answer = await self._guest("GET", f"/files?path={quote(path)}")
        if answer.status == 200 and answer.whole and answer.body != body:
            self._world.blame(f"{path} is {len(answer.body)} bytes and not what was put there, {len(body)} bytes")

    async def _call(self, name: str, **message: object) -> dict[str, Any] | None:
        """A unary call of the filesystem service; None when it was not answered."""
        answer = await self._guest("POST", f"/filesystem.Filesystem/{name}", json.dumps(message).encode())
        if answer.status != 200 or not answer.whole:
            return None
        found: dict[str, Any] = json.loads(answer.body)
        return found
