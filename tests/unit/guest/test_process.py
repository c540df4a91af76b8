"""The process service, by its bytes: what runs, as whom, what it says, how it ends, what stays behind (nothing)."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.wire import connect
from tests.unit.guest.house import RunningGuest, alive, start_guest, wait_until

SH = "/bin/bash"


@pytest.fixture(scope="module", params=["spawned", "forked"])
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGuest]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "forked":
            patch.setattr("penstock.guest.guise.usable", lambda: False)
        guest = start_guest(tmp_path_factory.mktemp("guest"), env={"FROM": "birth", "E2B_SANDBOX": "forged"})
    yield guest
    assert guest.stop() == 0
    assert [line for line in guest.log() if line["event"] == "fault"] == []


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def send(guest: RunningGuest, pid: int, data: bytes, kind: str = "stdin") -> tuple[int, Any]:
    return guest.call("SendInput", {"process": {"pid": pid}, "input": {kind: b64(data)}})


def kill(guest: RunningGuest, pid: int, name: str = "SIGNAL_SIGKILL") -> tuple[int, Any]:
    return guest.call("SendSignal", {"process": {"pid": pid}, "signal": name})


# ---- running -----------------------------------------------------------------------------------------------------


def test_start_output_and_end(guest: RunningGuest) -> None:
    got = guest.run(SH, "-c", "echo out; echo err >&2; exit 3")
    assert (got.stdout, got.stderr) == (b"out\n", b"err\n")
    assert got.end == {"exitCode": 3, "exited": True, "status": "exit status 3", "error": "exit status 3"}
    assert "start" in got.events[0]
    assert "end" in got.events[-1]
    assert got.error is None


def test_exit_code_zero_is_left_out(guest: RunningGuest) -> None:
    assert guest.run("true").end == {"exited": True, "status": "exit status 0"}


def test_death_by_signal_is_told_in_gos_words(guest: RunningGuest) -> None:
    got = guest.run(SH, "-c", "kill -SEGV $$")
    assert got.end is not None
    assert got.end["exitCode"] == -1
    assert "exited" not in got.end
    assert got.end["status"].startswith("signal: segmentation fault")


def test_output_comes_whole_however_it_is_cut(guest: RunningGuest) -> None:
    split = guest.run(SH, "-c", r"printf '\xe2'; sleep 0.05; printf '\x82\xac'")
    assert split.stdout == "€".encode()
    line = guest.run(SH, "-c", "printf '%8191d\n' 1")
    assert len(line.stdout) == 8192
    much = guest.run("head", "-c", "5000000", "/dev/zero")
    assert len(much.stdout) == 5_000_000


def test_all_output_comes_before_the_end(guest: RunningGuest) -> None:
    got = guest.run(SH, "-c", "(sleep 0.2; echo late) & echo early")
    assert got.stdout == b"early\nlate\n"
    assert "end" in got.events[-1]


def test_the_environment_in_its_order(guest: RunningGuest) -> None:
    got = guest.run("env", envs={"FROM": "call", "E2B_SANDBOX_ID": "forged", "X": "ä=1"})
    env = dict(line.split("=", 1) for line in got.stdout.decode().splitlines())
    assert (env["FROM"], env["X"]) == ("call", "ä=1")
    assert (env["E2B_SANDBOX"], env["E2B_SANDBOX_ID"], env["E2B_TEMPLATE_ID"]) == ("true", "itest", "base")
    assert (env["USER"], env["LOGNAME"], env["HOME"]) == ("root", "root", "/root")
    assert env["PATH"].endswith("/usr/bin:/sbin:/bin")
    assert set(env) == {
        "FROM",
        "X",
        "E2B_SANDBOX",
        "E2B_SANDBOX_ID",
        "E2B_TEMPLATE_ID",
        "PENSTOCK_NOTICE",
        "USER",
        "LOGNAME",
        "HOME",
        "PATH",
    }


def test_a_child_has_nothing_of_ours(guest: RunningGuest) -> None:
    script = "ls /proc/self/fd | wc -l; cat /proc/self/oom_score_adj; ulimit -Sn"
    script += "; grep -E '^Sig(Blk|Ign)' /proc/self/status; umask"
    lines = guest.run(SH, "-c", script).stdout.decode().split("\n")
    assert int(lines[0]) <= 4  # 0, 1, 2 and the listing itself
    assert lines[1] == "500"
    assert [int(line.split()[1], 16) & 0x7FFFFFFF for line in lines[3:5]] == [0, 0]
    assert lines[5] == "0022"


def test_another_user_is_really_that_user(guest: RunningGuest) -> None:
    got = guest.run("id", user="nobody", cwd="/")
    assert got.stdout.startswith(b"uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)")
    assert guest.run("cat", "/etc/shadow", user="nobody", cwd="/").end == {
        "exitCode": 1, "exited": True, "status": "exit status 1", "error": "exit status 1"
    }  # fmt: skip


def test_each_process_leads_its_own_session(guest: RunningGuest) -> None:
    got = guest.run(SH, "-c", "echo $$ $(ps -o sid=,pgid= -p $$)")
    pid, session, group = got.stdout.split()
    assert pid == session == group == str(got.pid).encode()


def test_paths_of_the_working_directory(guest: RunningGuest) -> None:
    assert guest.run("pwd").stdout.decode().strip() == str(guest.folder)
    assert guest.run("pwd", cwd="~").stdout == b"/root\n"
    assert guest.run("pwd", cwd="/usr/../tmp").stdout == b"/tmp\n"


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options", "code", "message"),
    [
        ("true", {"user": "x"}, "unauthenticated", "invalid username: 'x'"),
        ("true", {"cwd": "/none/such"}, "invalid_argument", "cwd '/none/such' does not exist"),
        ("true", {"cwd": "/etc/passwd"}, "invalid_argument", "cwd '/etc/passwd' cannot be entered: Not a directory"),
        (
            "true",
            {"cwd": "/root/x", "user": "nobody"},
            "permission_denied",
            "cwd '/root/x' may not be entered by user 'nobody'",
        ),
        ("true", {"cwd": "~other"}, "invalid_argument", None),
        ("none-such", {}, "not_found", None),
        ("/none/such", {}, "not_found", None),
        ("/etc/passwd", {}, "permission_denied", None),
        ("/etc", {}, "permission_denied", None),
        ("", {}, "invalid_argument", None),
        ("tr\0ue", {}, "invalid_argument", None),
        ("true", {"envs": {"A=B": "c"}}, "invalid_argument", None),
        ("true", {"envs": {"": "c"}}, "invalid_argument", None),
        ("true", {"envs": {"A": "c\0"}}, "invalid_argument", None),
        ("true", {"envs": {"A": 1}}, "invalid_argument", None),
        ("true", {"tag": "x" * 300}, "invalid_argument", None),
        ("true", {"pty": {"size": {"cols": -1, "rows": 1}}}, "invalid_argument", None),
        ("true", {"Connect-Timeout-Ms": "soon"}, "invalid_argument", None),
        ("true", {"Authorization": "Basic !!!"}, "unauthenticated", None),
    ],
)
def test_what_cannot_be_started_says_why(
    guest: RunningGuest, command: str, options: dict[str, Any], code: str, message: str | None
) -> None:
    got = guest.run(command, **options)
    assert got.events == []
    assert got.error is not None
    assert got.error["code"] == code
    if message is not None:
        assert got.error["message"] == message


def test_a_deleted_and_a_forbidden_directory(guest: RunningGuest) -> None:
    folder = guest.folder / "closed"
    folder.mkdir(mode=0o700)
    refused = guest.run("true", cwd=str(folder), user="nobody").error
    assert refused is not None
    assert refused["code"] == "permission_denied"
    folder.rmdir()
    gone = guest.run("true", cwd=str(folder)).error
    assert gone == {"code": "invalid_argument", "message": f"cwd '{folder}' does not exist"}


def test_arguments_beyond_the_kernels_limit(guest: RunningGuest) -> None:
    got = guest.run("true", "x" * 200_000)
    assert got.error is not None
    assert got.error["code"] == "invalid_argument"


def test_two_messages_are_not_one(guest: RunningGuest) -> None:
    frame = connect.frame(b'{"process":{"cmd":"true"}}')
    for body in (b"", frame + frame, frame[:-1], frame[:3]):
        _, _, answer = guest.request("POST", "/process.Process/Start", body, Content_Type="application/connect+json")
        assert b"invalid_argument" in answer


def test_failed_starts_leave_nothing(guest: RunningGuest) -> None:
    before = len(os.listdir(f"/proc/{guest.pid}/fd"))
    for _ in range(20):
        guest.run("/etc/passwd")
        guest.run("true", cwd="/none")
    assert guest.call("List", {})[1] == {"processes": []}
    assert wait_until(lambda: len(os.listdir(f"/proc/{guest.pid}/fd")) <= before)
    assert wait_until(lambda: Path(f"/proc/{guest.pid}/task/{guest.pid}/children").read_text() == "")


# ---- input ---------------------------------------------------------------------------------------------------------


def test_stdin_is_echoed_as_one_chunk_and_closed(guest: RunningGuest) -> None:
    stream = guest.start("cat")
    pid = stream.pid()
    assert send(guest, pid, b"Hello, World!") == (200, {})
    event = stream.event()
    assert event == {"data": {"stdout": b64(b"Hello, World!")}}
    assert guest.call("CloseStdin", {"process": {"pid": pid}}) == (200, {})
    status, body = send(guest, pid, b"more")
    assert (status, body["code"]) in ((500, "internal"), (404, "not_found"))
    end = stream.event()
    assert end is not None
    assert end["end"]["exited"] is True
    assert guest.call("CloseStdin", {"process": {"pid": pid}})[0] == 404


def test_closing_stdin_twice_changes_nothing(guest: RunningGuest) -> None:
    stream = guest.start(SH, "-c", "cat >/dev/null; sleep 30")
    pid = stream.pid()
    for _ in range(2):
        assert guest.call("CloseStdin", {"process": {"pid": pid}}) == (200, {})
    kill(guest, pid)
    stream.outcome()


def test_without_stdin_reading_ends_at_once(guest: RunningGuest) -> None:
    assert guest.run("cat", stdin=False).end == {"exited": True, "status": "exit status 0"}


def test_input_of_the_wrong_kind(guest: RunningGuest) -> None:
    stream = guest.start("cat")
    pid = stream.pid()
    assert send(guest, pid, b"x", kind="pty")[1]["code"] == "internal"
    assert guest.call("SendInput", {"process": {"pid": pid}, "input": {}})[1]["code"] == "unimplemented"
    assert guest.call("SendInput", {"process": {"pid": pid}, "input": {"stdin": "?"}})[1]["code"] == "invalid_argument"
    assert (
        guest.call("Update", {"process": {"pid": pid}, "pty": {"size": {"cols": 1, "rows": 1}}})[1]["code"]
        == "internal"
    )
    kill(guest, pid)
    stream.outcome()


def test_streamed_input_arrives_in_order(guest: RunningGuest) -> None:
    stream = guest.start("cat")
    pid = stream.pid()
    messages: list[dict[str, Any]] = [{"start": {"process": {"pid": pid}}}]
    messages += [{"data": {"input": {"stdin": b64(b"%d " % number)}}} for number in range(50)]
    messages += [{"keepalive": {}}]
    body = b"".join(connect.frame(json.dumps(message).encode()) for message in messages)
    status, _, answer = guest.request(
        "POST", "/process.Process/StreamInput", body, Content_Type="application/connect+json"
    )
    assert status == 200
    assert connect.FrameReader().feed(answer) == [(0, b"{}"), (2, b"{}")]
    assert stream.until("stdout", b"49 ") == b"".join(b"%d " % number for number in range(50))
    kill(guest, pid)
    stream.outcome()


def test_a_megabyte_of_input(guest: RunningGuest) -> None:
    stream = guest.start("wc", "-c")
    pid = stream.pid()
    assert send(guest, pid, b"x" * 1_000_000)[0] == 200
    guest.call("CloseStdin", {"process": {"pid": pid}})
    assert stream.outcome().stdout == b"1000000\n"


def test_input_to_a_process_that_dies_is_an_error_not_a_hang(guest: RunningGuest) -> None:
    stream = guest.start("sleep", "0.3")
    status, body = send(guest, stream.pid(), b"x" * 1_000_000)
    assert (status, body["code"]) == (500, "internal")
    stream.outcome()


# ---- signals and ends ------------------------------------------------------------------------------------------------


def test_after_a_kill_the_pid_is_nobodys(guest: RunningGuest) -> None:
    for _ in range(10):
        stream = guest.start("sleep", "100")
        pid = stream.pid()
        assert kill(guest, pid) == (200, {})
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        got = stream.outcome()
        assert got.end == {"exitCode": -1, "status": "signal: killed", "error": "signal: killed"}


def test_a_kill_takes_the_whole_session(guest: RunningGuest) -> None:
    stream = guest.start(SH, "-c", "set -m; sleep 1000 & echo $!; bash -c 'sleep 1000 & echo $!; wait'; wait")
    pid = stream.pid()
    children = [int(word) for word in stream.until("stdout", b"\n").split()]
    while len(children) < 2:
        children += [int(word) for word in stream.until("stdout", b"\n").split()]
    assert all(alive(child) for child in children)
    kill(guest, pid)
    stream.outcome()
    assert wait_until(lambda: not any(alive(child) for child in children))


def test_terminate_reaches_the_group(guest: RunningGuest) -> None:
    stream = guest.start(SH, "-c", "sleep 1000 & echo $!; wait")
    pid = stream.pid()
    child = int(stream.until("stdout", b"\n"))
    assert kill(guest, pid, "SIGNAL_SIGTERM") == (200, {})
    got = stream.outcome()
    assert got.end is not None
    assert got.end["status"] == "signal: terminated"
    assert wait_until(lambda: not alive(child))


def test_other_signals_are_not_sent(guest: RunningGuest) -> None:
    stream = guest.start("sleep", "100")
    pid = stream.pid()
    status, body = kill(guest, pid, "SIGNAL_SIGUSR1")
    assert (status, body["code"]) == (501, "unimplemented")
    kill(guest, pid)
    stream.outcome()


def test_a_grandchild_with_the_pipe_cannot_delay_the_end_after_a_signal(guest: RunningGuest) -> None:
    stream = guest.start(SH, "-c", "setsid bash -c 'echo $$; exec sleep 20' & exec sleep 1000")
    pid = stream.pid()
    lingering = int(stream.until("stdout", b"\n"))
    began = time.monotonic()
    kill(guest, pid)
    assert stream.outcome().end is not None
    assert time.monotonic() - began < 5
    assert alive(lingering)
    os.kill(lingering, signal.SIGKILL)


def test_the_timeout_is_the_processs(guest: RunningGuest) -> None:
    stream = guest.start(SH, "-c", "sleep 1000 & wait", Connect_Timeout_Ms="300")
    pid = stream.pid()
    got = stream.outcome()
    assert got.error is not None
    assert got.error["code"] == "deadline_exceeded"
    assert not alive(pid)


def test_the_timeout_holds_when_nobody_listens(guest: RunningGuest) -> None:
    stream = guest.start("sleep", "1000", Connect_Timeout_Ms="400")
    pid = stream.pid()
    stream.close()
    assert alive(pid)
    assert wait_until(lambda: not alive(pid), 3)


def test_unknown_processes(guest: RunningGuest) -> None:
    for method in ("SendInput", "SendSignal", "CloseStdin", "Update"):
        status, body = guest.call(method, {"process": {"pid": 4_000_000}, "signal": 9, "input": {"stdin": ""}})
        assert (status, body["code"]) == (404, "not_found")
        assert guest.call(method, {"process": {"tag": "none"}})[0] == 404
        assert guest.call(method, {})[0] == 400
    missing = guest.open("Connect", {"process": {"pid": 4_000_000}}).outcome()
    assert missing.error is not None
    assert missing.error["code"] == "not_found"


def test_only_our_own_processes_can_be_signalled(guest: RunningGuest) -> None:
    assert kill(guest, os.getpid())[0] == 404
    assert kill(guest, guest.pid)[0] == 404


# ---- listening -------------------------------------------------------------------------------------------------------


def test_a_dropped_stream_leaves_the_process_and_output_is_dropped(guest: RunningGuest) -> None:
    stream = guest.start(
        SH, "-c", "for i in $(seq 300); do echo $i; printf '%10000d' 0; sleep 0.005; done; echo done", tag="t1"
    )
    pid = stream.pid()
    stream.close()
    time.sleep(0.3)
    (info,) = guest.call("List", {})[1]["processes"]
    assert (info["pid"], info["tag"], info["config"]["cmd"]) == (pid, "t1", SH)
    again = guest.open("Connect", {"process": {"tag": "t1"}})
    got = again.outcome()
    assert got.pid == pid
    assert got.stdout.endswith(b"done\n")
    assert not got.stdout.startswith(b"1\n")
    assert got.end == {"exited": True, "status": "exit status 0"}


def test_a_late_connect_learns_the_end(guest: RunningGuest) -> None:
    pid = guest.run(SH, "-c", "exit 7", tag="late").pid
    for selector in ({"pid": pid}, {"tag": "late"}):
        got = guest.open("Connect", {"process": selector}).outcome()
        assert [list(event) for event in got.events] == [["start"], ["end"]]
        assert got.end is not None
        assert got.end["exitCode"] == 7
    assert guest.call("List", {})[1] == {"processes": []}


def test_all_listeners_hear_everything(guest: RunningGuest) -> None:
    first = guest.start("cat", tag="many")
    pid = first.pid()
    others = [guest.open("Connect", {"process": {"pid": pid}}) for _ in range(5)]
    for other in others:
        assert other.pid() == pid
    send(guest, pid, b"to all")
    guest.call("CloseStdin", {"process": {"pid": pid}})
    for reader in (first, *others):
        got = reader.outcome()
        assert got.stdout == b"to all"
        assert got.end is not None


def test_silence_is_filled_with_keepalives(guest: RunningGuest) -> None:
    stream = guest.start(SH, "-c", "sleep 2.5", Keepalive_Ping_Interval="1")
    got = stream.outcome()
    assert [next(iter(event)) for event in got.events] == ["start", "keepalive", "keepalive", "end"]


def test_a_slow_listener_holds_the_process_back_and_a_vanished_one_does_not(guest: RunningGuest) -> None:
    before = guest.memory_kib()
    slow = guest.start(SH, "-c", "head -c 100000000 /dev/zero; echo end >&2", tag="flood")
    pid = slow.pid()
    quick = guest.open("Connect", {"process": {"pid": pid}})
    quick.pid()
    time.sleep(0.5)  # nobody reads: the process must be standing still by now
    assert alive(pid)
    assert guest.memory_kib() - before < 6 * 1024
    slow.close()
    got = quick.outcome()
    assert got.end == {"exited": True, "status": "exit status 0"}
    assert guest.memory_kib() - before < 6 * 1024


def test_a_hundred_megabytes_reach_a_slow_reader_whole(guest: RunningGuest) -> None:
    before = guest.memory_kib()
    stream = guest.start("head", "-c", "100000000", "/dev/zero")
    stream.pid()
    size, peak = 0, 0
    for count, event in enumerate(stream.events()):
        size += len(base64.b64decode(event.get("data", {}).get("stdout", "")))
        if count % 200 == 0:
            time.sleep(0.005)
            peak = max(peak, guest.memory_kib())
    assert size == 100_000_000
    assert peak - before < 6 * 1024


# ---- terminals -------------------------------------------------------------------------------------------------------


def test_a_terminal_of_eighty_then_a_hundred_columns(guest: RunningGuest) -> None:
    stream = guest.start(
        SH, "--norc", "-i", pty={"size": {"cols": 80, "rows": 24}}, envs={"TERM": "xterm-256color", "PS1": "$ "}
    )
    pid = stream.pid()
    assert guest.call("CloseStdin", {"process": {"pid": pid}})[1]["code"] == "unknown"
    send(guest, pid, b"tput cols; tty\n", kind="pty")
    assert b"/dev/pts/" in stream.until("pty", b"/dev/pts/")
    resized = guest.call("Update", {"process": {"pid": pid}, "pty": {"size": {"cols": 100, "rows": 30}}})
    assert resized == (200, {})
    send(guest, pid, b"stty size\n", kind="pty")
    stream.until("pty", b"30 100")
    again = guest.open("Connect", {"process": {"pid": pid}})
    again.pid()
    send(guest, pid, b"exit\n", kind="pty")
    for reader in (stream, again):
        assert reader.outcome().end == {"exited": True, "status": "exit status 0"}


def test_killing_a_terminal_takes_its_background_jobs(guest: RunningGuest) -> None:
    stream = guest.start(SH, "--norc", "-i", pty={"size": {"cols": 80, "rows": 24}}, envs={"PS1": "$ "})
    pid = stream.pid()
    send(guest, pid, b"sleep 1000 & echo job=$!.\n", kind="pty")
    seen = b""
    while b"job=" not in seen or not seen.rpartition(b"job=")[2].partition(b".")[0].isdigit():
        seen += stream.until("pty", b"\n")
    job = int(seen.rpartition(b"job=")[2].partition(b".")[0])
    assert alive(job)
    assert kill(guest, pid) == (200, {})
    assert stream.outcome().end is not None
    assert wait_until(lambda: not alive(job))


# ---- bounds and the end of the guest ----------------------------------------------------------------------


def test_beyond_the_bound_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.guest.main.PROCESSES_MAX", 8)
    guest = start_guest(tmp_path)
    try:
        running = [guest.start("sleep", "100") for _ in range(8)]
        for stream in running:
            stream.pid()
        refused = guest.run("true").error
        assert refused is not None
        assert refused["code"] == "resource_exhausted"
    finally:
        assert guest.stop() == 0


def test_the_end_of_the_guest_is_orderly(tmp_path: Path) -> None:
    guest = start_guest(tmp_path)
    gentle = guest.start(SH, "-c", "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done")
    stubborn = guest.start(SH, "-c", "trap '' TERM; echo up; sleep 1000")
    gentle.pid()
    pid = stubborn.pid()
    gentle.until("stdout", b"up")
    stubborn.until("stdout", b"up")
    began = time.monotonic()
    assert guest.stop() == 0
    assert 3 < time.monotonic() - began < 6
    assert not alive(pid)
    got = gentle.outcome()
    assert (got.stdout, got.end and got.end["exitCode"]) == (b"bye\n", 5)
    events = [line["event"] for line in guest.log()]
    assert "stopping" in events


def test_the_log_tells_of_starts_and_ends(guest: RunningGuest) -> None:
    pid = guest.run(SH, "-c", "exit 4 # " + "x" * 5000).pid
    lines = {line["event"]: line for line in guest.log() if line.get("pid") == pid}
    assert lines["process started"]["user"] == "root"
    assert len(lines["process started"]["cmd"]) <= 512
    assert lines["process ended"]["status"] == "exit status 4"
