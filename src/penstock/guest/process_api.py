"""The process service of the envd protocol, `/process.Process/*`. Source: E2B's spec/envd/process.proto."""

from __future__ import annotations

import binascii
import signal
from collections.abc import AsyncIterator
from typing import Any, Final

from penstock.guest.exchange import Disconnected
from penstock.guest.parts import Parts
from penstock.guest.process import Listener, Process, event_payload
from penstock.guest.processes import COLUMNS_DEFAULT, ROWS_DEFAULT, Ended, Order, Processes
from penstock.guest.rpc import Call, Events, Message
from penstock.wire import connect
from penstock.wire.connect import Code, ConnectError

TAG_CHARS_MAX: Final = 256
SIZE_MAX: Final = 65_535  # of a terminal, in characters; the kernel's field is 16 bits

_SERVICE: Final = "/process.Process/"


def register(parts: Parts, processes: Processes) -> None:
    """Serve the eight calls."""
    api = ProcessApi(processes)
    rpc = parts.rpc
    rpc.unary(_SERVICE + "List", api.list)
    rpc.unary(_SERVICE + "Update", api.update)
    rpc.unary(_SERVICE + "SendInput", api.send_input)
    rpc.unary(_SERVICE + "SendSignal", api.send_signal)
    rpc.unary(_SERVICE + "CloseStdin", api.close_stdin)
    rpc.server_stream(_SERVICE + "Start", api.start, limits_itself=True)
    rpc.server_stream(_SERVICE + "Connect", api.connect)
    rpc.client_stream(_SERVICE + "StreamInput", api.stream_input)


class ProcessApi:
    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    async def list(self, call: Call, message: Message) -> Message:
        return {"processes": [_info(process) for process in self._processes.started()]}

    async def start(self, call: Call, message: Message, events: Events) -> None:
        """Start, then the process's events until its end. A client that goes away leaves it running; when
        Connect-Timeout-Ms is over it is killed and the stream ends with deadline_exceeded."""
        order = _order(call, message)
        process = await self._processes.start(order)
        if call.timeout_s is not None:
            process.limit(call.timeout_s)
        listener: Listener | None = None
        try:
            await events.send_payload(event_payload({"start": {"pid": process.pid}}))
            listener = process.listen(events, call.keepalive_s)
        finally:
            process.begin(self._note_end)
        await _follow(call, process, listener, events, limited=True)

    async def connect(self, call: Call, message: Message, events: Events) -> None:
        """Start event, then what the process says from now on; of one that ended, how."""
        found = self._processes.get_or_ended(message.get("process"))
        await events.send_payload(event_payload({"start": {"pid": found.pid}}))
        if isinstance(found, Ended):
            await events.finish(last=connect.frame(event_payload({"end": found.end_event})))
            return
        listener = found.listen(events, call.keepalive_s)
        await _follow(call, found, listener, events, limited=False)

    async def update(self, call: Call, message: Message) -> Message:
        process = self._processes.get(message.get("process"))
        size = _pty_size(message.get("pty"))
        if size is not None:
            process.resize(*size)
        return {}

    async def send_input(self, call: Call, message: Message) -> Message:
        process = self._processes.get(message.get("process"))
        await process.write(*_input(message.get("input")))
        return {}

    async def stream_input(self, call: Call, messages: AsyncIterator[Message]) -> Message:
        """One `start` that names the process, then any number of `data` and `keepalive`."""
        process: Process | None = None
        async for message in messages:
            if "start" in message:
                process = self._processes.get(_object(message["start"], "start").get("process"))
            elif "data" in message:
                if process is None:
                    raise ConnectError(Code.INVALID_ARGUMENT, "data came before the start that names the process")
                await process.write(*_input(_object(message["data"], "data").get("input")))
            elif "keepalive" not in message:
                raise ConnectError(Code.UNIMPLEMENTED, "this kind of input event is not known")
        return {}

    async def send_signal(self, call: Call, message: Message) -> Message:
        """Answers to a SIGKILL only once the process was reaped: then its pid is nobody's."""
        process = self._processes.get(message.get("process"))
        wanted = message.get("signal")
        if wanted in ("SIGNAL_SIGKILL", 9):
            await self._processes.kill(process)
        elif wanted in ("SIGNAL_SIGTERM", 15):
            process.signal(signal.SIGTERM)
        else:
            raise ConnectError(
                Code.UNIMPLEMENTED, f"signal {str(wanted)[:40]!r} cannot be sent; SIGTERM and SIGKILL can"
            )
        return {}

    async def close_stdin(self, call: Call, message: Message) -> Message:
        await self._processes.get(message.get("process")).close_stdin()
        return {}

    def _note_end(self, process: Process) -> None:
        self._processes.note_end(process)


async def _follow(call: Call, process: Process, listener: Listener | None, events: Events, *, limited: bool) -> None:
    """Wait for the end of the process or of the client, and tell the client of the former."""
    if listener is None:
        return
    call.exchange.on_disconnect(listener.close)
    try:
        await listener.done
    finally:
        listener.close()
    if process.end_event is None:
        raise Disconnected
    if limited and process.timed_out:
        raise ConnectError(Code.DEADLINE_EXCEEDED, f"process {process.pid} was killed: its timeout is over")
    await events.finish(last=connect.frame(event_payload({"end": process.end_event})))


# ---- reading messages ----------------------------------------------------------------------------------------


def _order(call: Call, message: Message) -> Order:
    config = _object(message.get("process"), "process")
    command, args, env = config.get("cmd", ""), config.get("args") or [], config.get("envs") or {}
    cwd, tag, stdin = config.get("cwd") or "", message.get("tag"), message.get("stdin")
    if not isinstance(command, str) or not command:
        raise ConnectError(Code.INVALID_ARGUMENT, "process.cmd must be a non-empty string")
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise ConnectError(Code.INVALID_ARGUMENT, "process.args must be a list of strings")
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise ConnectError(Code.INVALID_ARGUMENT, "process.envs must map strings to strings")
    if not isinstance(cwd, str):
        raise ConnectError(Code.INVALID_ARGUMENT, "process.cwd must be a string")
    if tag is not None and (not isinstance(tag, str) or len(tag) > TAG_CHARS_MAX):
        raise ConnectError(Code.INVALID_ARGUMENT, f"tag must be a string of at most {TAG_CHARS_MAX} characters")
    return Order(
        command=command,
        args=args,
        env=env,
        cwd=cwd,
        user=call.user,
        tag=tag,
        stdin=stdin is not False,
        pty_size=_pty_size(message.get("pty")),
    )


def _pty_size(pty: object) -> tuple[int, int] | None:
    if pty is None:
        return None
    size = _object(pty, "pty").get("size")
    if size is None:
        return COLUMNS_DEFAULT, ROWS_DEFAULT
    size = _object(size, "pty.size")
    columns, rows = size.get("cols", 0), size.get("rows", 0)
    for value in (columns, rows):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= SIZE_MAX:
            raise ConnectError(Code.INVALID_ARGUMENT, f"pty.size must be numbers from 0 to {SIZE_MAX}")
    return columns, rows


def _input(value: object) -> tuple[str, bytes]:
    given = _object(value, "input")
    for kind in ("stdin", "pty"):
        if kind in given:
            return kind, _base64(given[kind])
    raise ConnectError(Code.UNIMPLEMENTED, "input must be stdin or pty")


def _base64(text: object) -> bytes:
    """Bytes of a proto3 JSON field: standard or URL-safe alphabet, padding optional."""
    if not isinstance(text, str):
        raise ConnectError(Code.INVALID_ARGUMENT, "bytes are written in base64")
    try:
        data = text.encode("ascii").translate(_URL_SAFE)
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except ValueError:
        raise ConnectError(Code.INVALID_ARGUMENT, "bytes are written in base64") from None


_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConnectError(Code.INVALID_ARGUMENT, f"{name} must be an object")
    return value


def _info(process: Process) -> Message:
    info: Message = {"config": process.config, "pid": process.pid}
    if process.tag is not None:
        info["tag"] = process.tag
    return info
