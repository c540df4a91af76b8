"""What the unmodified E2B Python SDK must be able to do, synchronously. Runs under any supported SDK version:

    E2B_API_URL=… E2B_SANDBOX_URL=… E2B_API_KEY=… python -m pytest tests/sdk/suite.py

The list is that of the SDK's own live tests, for what is built. It imports nothing of Penstock.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import e2b
import pytest
from e2b import CommandExitException, PtySize, Sandbox, SandboxQuery, SandboxState

try:
    from e2b import FileNotFoundException as Missing
except ImportError:
    from e2b import NotFoundException as Missing

VERSION = tuple(int(part) for part in e2b.__version__.split(".")[:2]) if hasattr(e2b, "__version__") else (2, 63)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    made = Sandbox.create(timeout=300)
    yield made
    made.kill()


@pytest.fixture
def fresh() -> Iterator[Sandbox]:
    made = Sandbox.create(timeout=60)
    yield made
    made.kill()


def visit(host: str, path: str = "/", headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """One GET of http://<host><path> through the ingress, whatever the machine's resolver knows."""
    ingress = urlsplit(os.environ["E2B_SANDBOX_URL"])
    connection = http.client.HTTPConnection(ingress.hostname or "", ingress.port, timeout=10)
    try:
        connection.request("GET", path, headers={"Host": host, **(headers or {})})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def eventually(check, within_s: float = 10.0):
    until = time.monotonic() + within_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


# ---- life ------------------------------------------------------------------------------------------------


def test_create_and_kill():
    made = Sandbox.create(timeout=30)
    assert made.is_running()
    assert made.kill() is True
    assert made.is_running() is False
    assert Sandbox.kill(made.sandbox_id) is False


def test_kill_of_an_unknown_sandbox_is_false():
    assert Sandbox.kill("nonexistentsandbox") is False


def test_metadata_and_environment_are_kept():
    made = Sandbox.create(timeout=30, metadata={"purpose": "a b&c=d"}, envs={"GREETING": "hi there"})
    try:
        info = made.get_info()
        assert info.metadata == {"purpose": "a b&c=d"}
        assert made.commands.run("echo $GREETING").stdout.strip() == "hi there"
    finally:
        made.kill()


def test_connect_finds_the_same_sandbox(box: Sandbox):
    box.files.write("/home/user/mark", "here")
    again = Sandbox.connect(box.sandbox_id)
    assert again.files.read("/home/user/mark") == "here"


def test_connect_extends_and_never_shortens(fresh: Sandbox):
    end = fresh.get_info().end_at
    Sandbox.connect(fresh.sandbox_id, timeout=5)
    assert fresh.get_info().end_at == end
    Sandbox.connect(fresh.sandbox_id, timeout=600)
    assert fresh.get_info().end_at > end + timedelta(seconds=300)


def test_timeout_ends_it_in_time():
    made = Sandbox.create(timeout=30)
    made.set_timeout(2)
    assert made.is_running()
    time.sleep(3)
    assert made.is_running() is False


def test_a_new_timeout_moves_the_end(fresh: Sandbox):
    fresh.set_timeout(500)
    left = fresh.get_info().end_at - datetime.now(UTC)
    assert timedelta(seconds=480) < left < timedelta(seconds=510)


def test_info_tells_what_it_is(fresh: Sandbox):
    info = fresh.get_info()
    assert info.sandbox_id == fresh.sandbox_id
    assert info.state == SandboxState.RUNNING
    assert info.started_at <= datetime.now(UTC) < info.end_at


# ---- lists -----------------------------------------------------------------------------------------------


def test_list_filters_by_metadata_and_pages():
    mark = f"m{time.time_ns()}"
    boxes = [Sandbox.create(timeout=60, metadata={"mark": mark, "n": str(n)}) for n in range(3)]
    try:
        pages = Sandbox.list(query=SandboxQuery(metadata={"mark": mark}), limit=1)
        seen = []
        while pages.has_next:
            seen += [item.sandbox_id for item in pages.next_items()]
        assert pages.next_token is None
        assert seen == [made.sandbox_id for made in reversed(boxes)]
        one = Sandbox.list(query=SandboxQuery(metadata={"mark": mark, "n": "1"})).next_items()
        assert [item.sandbox_id for item in one] == [boxes[1].sandbox_id]
        assert Sandbox.list(query=SandboxQuery(metadata={"mark": "other"})).next_items() == []
    finally:
        for made in boxes:
            made.kill()


# ---- commands --------------------------------------------------------------------------------------------


def test_a_command_answers(box: Sandbox):
    ran = box.commands.run("echo hello; echo oops >&2")
    assert (ran.stdout, ran.stderr, ran.exit_code) == ("hello\n", "oops\n", 0)


def test_a_failing_command_raises_with_its_code(box: Sandbox):
    with pytest.raises(CommandExitException) as failed:
        box.commands.run("echo before; exit 7")
    assert failed.value.exit_code == 7
    assert failed.value.stdout == "before\n"


def test_output_is_streamed(box: Sandbox):
    heard: list[str] = []
    ran = box.commands.run("echo one; sleep 0.2; echo two", on_stdout=heard.append)
    assert len(heard) == 2
    assert "".join(heard) == ran.stdout == "one\ntwo\n"


def test_split_utf8_arrives_whole(box: Sandbox):
    assert box.commands.run(r"printf '\xe2'; sleep 0.1; printf '\x82\xac'").stdout == "€"


def test_a_long_line_arrives_whole(box: Sandbox):
    assert len(box.commands.run("head -c 8191 /dev/zero | tr '\\0' x").stdout) == 8191


def test_user_working_folder_and_environment(box: Sandbox):
    assert box.commands.run("id -un").stdout == "user\n"
    assert box.commands.run("id -un", user="root").stdout == "root\n"
    assert box.commands.run("pwd").stdout == "/home/user\n"
    assert box.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"
    assert box.commands.run("echo $X", envs={"X": "1 2"}).stdout == "1 2\n"


def test_sudo_gives_the_sandboxes_own_root(box: Sandbox):
    assert box.commands.run("sudo -n id -u").stdout == "0\n"
    assert box.commands.run("sudo -n sh -c 'echo $SECRET'", envs={"SECRET": "x"}).stdout == "\n"


def test_standard_input_reaches_the_process(box: Sandbox):
    handle = box.commands.run("cat", background=True, stdin=True)
    box.commands.send_stdin(handle.pid, "typed\n")
    heard = []
    for out, _, _ in handle:
        heard.append(out)
        break
    assert heard == ["typed\n"]
    handle.kill()


def test_processes_are_listed_and_killed(box: Sandbox):
    handle = box.commands.run("sleep 1000", background=True)
    assert handle.pid in [process.pid for process in box.commands.list()]
    assert box.commands.kill(handle.pid) is True
    with pytest.raises(CommandExitException):
        box.commands.run(f"kill -0 {handle.pid}")
    assert box.commands.kill(handle.pid) is False


def test_a_command_can_be_connected_to(box: Sandbox):
    handle = box.commands.run("sleep 0.5; echo late", background=True)
    again = box.commands.connect(handle.pid)
    assert again.wait().stdout == "late\n"


def test_a_command_ends_at_its_timeout(box: Sandbox):
    with pytest.raises(e2b.TimeoutException):
        box.commands.run("sleep 100", timeout=1)


# ---- terminals -------------------------------------------------------------------------------------------


def test_a_terminal_has_its_size_and_can_be_resized(box: Sandbox):
    screen: list[bytes] = []
    terminal = box.pty.create(PtySize(rows=24, cols=80))
    box.pty.send_stdin(terminal.pid, b"tput cols\n")
    box.pty.resize(terminal.pid, PtySize(rows=24, cols=100))
    box.pty.send_stdin(terminal.pid, b"sleep 0.2; tput cols; exit\n")
    ended = terminal.wait(on_pty=screen.append)
    assert ended.exit_code == 0
    assert b"100" in b"".join(screen)


# ---- files -----------------------------------------------------------------------------------------------


def test_a_file_is_written_and_read(box: Sandbox):
    wrote = box.files.write("notes/today.txt", "text ✓")
    assert wrote.path == "/home/user/notes/today.txt"
    assert box.files.read("notes/today.txt") == "text ✓"
    assert bytes(box.files.read("notes/today.txt", format="bytes")) == "text ✓".encode()
    info = box.files.get_info("notes/today.txt")
    assert (info.owner, info.group, info.mode, info.size) == ("user", "user", 0o644, 8)


def test_a_stream_is_read_whole(box: Sandbox):
    box.files.write("big", b"x" * 230_000)
    assert sum(len(part) for part in box.files.read("big", format="stream")) == 230_000


def test_several_files_are_written_at_once(box: Sandbox):
    box.files.write_files([{"path": f"many/{n}", "data": str(n)} for n in range(5)])
    assert sorted(entry.name for entry in box.files.list("many")) == ["0", "1", "2", "3", "4"]


def test_folders(box: Sandbox):
    assert box.files.make_dir("a/b/c") is True
    assert box.files.make_dir("a/b/c") is False
    assert box.files.exists("a/b/c") is True
    box.files.write("a/file", "1")
    assert box.files.rename("a/file", "a/b/moved").path == "/home/user/a/b/moved"
    assert {entry.path for entry in box.files.list("a", depth=2)} == {
        "/home/user/a/b",
        "/home/user/a/b/c",
        "/home/user/a/b/moved",
    }
    box.files.remove("a")
    assert box.files.exists("a") is False


def test_what_is_missing_is_not_found(box: Sandbox):
    with pytest.raises(Missing):
        box.files.read("/no/such/file")
    with pytest.raises(Missing):
        box.files.list("/no/such/folder")


def test_a_watcher_sees_a_write_at_once(box: Sandbox):
    box.files.make_dir("watched")
    watcher = box.files.watch_dir("watched")
    box.files.write("watched/new", "1")
    kinds = [event.type.value for event in watcher.get_new_events() if event.name == "new"]
    watcher.stop()
    assert kinds == ["create", "chmod", "write"]


def test_a_recursive_watcher_sees_folders_made_later(box: Sandbox):
    box.files.make_dir("deep")
    watcher = box.files.watch_dir("deep", recursive=True)
    box.files.make_dir("deep/er")
    watcher.get_new_events()
    box.files.write("deep/er/file", "1")
    names = {event.name for event in watcher.get_new_events()}
    watcher.stop()
    assert "er/file" in names


def test_signed_addresses_work_without_a_key(box: Sandbox):
    box.files.write("signed", "by signature")
    with urllib.request.urlopen(box.download_url("signed"), timeout=10) as reply:
        assert reply.read() == b"by signature"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(box.download_url("signed").replace("signature=v1_", "signature=v1_x"), timeout=10)
    assert refused.value.code == 401


# ---- hosts -----------------------------------------------------------------------------------------------


def test_a_web_server_is_reached_by_its_host_name(box: Sandbox):
    box.files.write("www/index.txt", "served")
    handle = box.commands.run("python3 -m http.server 8000 --directory /home/user/www", background=True)
    host = box.get_host(8000)
    assert host.startswith(f"8000-{box.sandbox_id}.")
    status, body = eventually(lambda: (found := visit(host, "/index.txt"))[0] == 200 and found)
    assert (status, body) == (200, b"served")
    handle.kill()


def test_a_server_on_localhost_alone_is_reached(box: Sandbox):
    handle = box.commands.run("python3 -m http.server 8001 --bind 127.0.0.1", background=True)
    assert eventually(lambda: visit(box.get_host(8001))[0] == 200)
    handle.kill()


def test_a_closed_port_and_a_gone_sandbox_answer_502(fresh: Sandbox):
    status, body = visit(fresh.get_host(3000), headers={"Accept": "application/json"})
    assert status == 502
    assert b"port is not open" in body
    fresh.kill()
    status, body = visit(fresh.get_host(3000), headers={"Accept": "application/json"})
    assert status == 502
    assert b"was not found" in body


def test_private_traffic_needs_its_token():
    made = Sandbox.create(timeout=60, network={"allow_public_traffic": False})
    try:
        made.commands.run("python3 -m http.server 8080", background=True)
        assert visit(made.get_host(8080))[0] == 403
        token = {"e2b-traffic-access-token": made.traffic_access_token}
        assert eventually(lambda: visit(made.get_host(8080), headers=token)[0] == 200)
    finally:
        made.kill()


# ---- the outside -----------------------------------------------------------------------------------------


def test_a_sandbox_does_not_reach_metadata_or_its_neighbours(box: Sandbox):
    for address in ("169.254.169.254", "10.201.0.1", "192.168.0.1"):
        ran = box.commands.run(f"curl -s --max-time 3 http://{address}/ || echo refused")
        assert ran.stdout == "refused\n", address


def test_metrics_are_taken(box: Sandbox):
    def sampled():
        return [metric for metric in box.get_metrics() if metric.mem_total > 0]

    metric = eventually(sampled, within_s=15)[-1]
    assert metric.cpu_count >= 1
    assert 0 < metric.mem_used < metric.mem_total
    assert metric.disk_total > 0
