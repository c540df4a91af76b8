"""The ingress against nginx and HAProxy, proxying to the same server, each on one core; small replies and 1 GiB.

    .venv/bin/python bench/ingress.py [--seconds S] [--json]

Core 0: the proxy. Core 1: the upstream (nginx, one worker, unix socket), the load (`wrk`, one thread), this script.
The ingress is the real process, fed over the real feed. `distinct` sends each request with another path, so that
nothing the ingress remembers of a head helps it. CPU per request is from /proc/<pid>/schedstat.

Open loop (`open_loop.py`): requests leave by the clock, at half of the ingress's own capacity as `wrk` has just found
it, whether or not earlier ones were answered; latency counts from when a request was due. *Added* is the difference to
the same load without a proxy. A run whose load did not keep up is made again, OPEN_LOOP_TRIES times at most; if none
did, the result says that the load was the limit, and its figure is no verdict on the proxy.

The large file is read once before it is measured: the first reading fills the page cache, at 4 s of the upstream's CPU
per GiB, and whoever came first would pay.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import open_loop

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed.local import LocalSource
from penstock.feed.server import FeedServer
from penstock.model import keys
from penstock.model.sandbox import Limits, Phase, SandboxSpec, SandboxStatus
from penstock.run import children
from penstock.store.memory import MemoryLog
from penstock.store.store import Store

SANDBOX = "ibench0000000000000000"
CONNECTIONS = 32
PROXY_CORE, LOAD_CORE = 0, 1
REPLY = b"x" * 91
LARGE_BYTES = 1024**3
OPEN_LOOP_TRIES = 3
ROUTING = {"E2b-Sandbox-Id": SANDBOX, "E2b-Sandbox-Port": "49983"}
# What the Python SDK sends with a call, so that heads have a realistic size.
SDK = {"User-Agent": "e2b-python-sdk/2.63.0", "Accept": "*/*", "X-Access-Token": "0" * 64, "Accept-Encoding": "gzip"}

UPSTREAM = """
worker_processes 1; pid {dir}/up.pid; error_log {dir}/up.err warn; daemon off;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 1000000000; sendfile on; tcp_nopush on;
  client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4;
  scgi_temp_path {dir}/t5;
  server {{ listen unix:{dir}/up.sock; listen 127.0.0.1:{port}; root {dir}/www;
    location /large {{ }} location / {{ default_type text/plain; return 200 "{reply}"; }} }} }}
"""
NGINX = """
worker_processes 1; pid {dir}/px.pid; error_log {dir}/px.err warn; daemon off;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 1000000000;
  client_body_temp_path {dir}/p1; proxy_temp_path {dir}/p2; fastcgi_temp_path {dir}/p3; uwsgi_temp_path {dir}/p4;
  scgi_temp_path {dir}/p5; proxy_buffering {buffering};
  upstream up {{ server unix:{dir}/up.sock; keepalive 64; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port};
    location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; }} }} }}
"""
HAPROXY = """
global
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  option http-keep-alive
listen px
  bind 127.0.0.1:{port}
  http-reuse always
  server up unix@{dir}/up.sock
"""
DISTINCT = """
local n, before, after = 0, nil, nil
init = function(args)
  local whole = wrk.format("GET", "/x?n=@")  -- once: it costs more than the request
  before, after = whole:match("^(.-)@(.*)$")
end
request = function() n = n + 1; return before .. n .. after end
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {LOAD_CORE})
    result = asyncio.run(run(arguments.seconds))
    print(json.dumps(result, indent=1) if arguments.json else table(result))


async def run(seconds: int) -> dict[str, object]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        (folder / "www").mkdir()
        folder.chmod(0o755)  # noqa: ASYNC240 - nginx's worker is another user
        (folder / "www" / "large").touch()
        os.truncate(folder / "www" / "large", LARGE_BYTES)  # sparse: its reads cost memory bandwidth, not a disk
        ports = {name: free_port() for name in ("direct", "nginx", "haproxy")}
        pids = {"upstream": stack.enter_context(nginx(folder, "up", UPSTREAM, ports["direct"], LOAD_CORE))}
        pids["nginx"] = stack.enter_context(nginx(folder, "px", NGINX, ports["nginx"], PROXY_CORE))
        if shutil.which("haproxy"):
            pids["haproxy"] = stack.enter_context(haproxy(folder, ports["haproxy"]))
        async with Crew("bench") as crew:
            child, url = await start_ingress(folder, crew)
            stack.callback(children.end, child, term_s=5.0)
            pids["ours"], ports["ours"] = child.pid, int(url.rpartition(":")[2])
            return await measure(folder, pids, ports, seconds)


async def measure(folder: Path, pids: dict[str, int], ports: dict[str, int], seconds: int) -> dict[str, object]:
    script = folder / "distinct.lua"
    script.write_text(DISTINCT)
    small: dict[str, dict[str, float]] = {}
    for name, pid in (("direct", pids["upstream"]), *((n, p) for n, p in pids.items() if n != "upstream")):
        small[name] = await off_loop(closed_loop, ports[name], pid, seconds, None)
    small["ours, distinct"] = await off_loop(closed_loop, ports["ours"], pids["ours"], seconds, script)
    small["nginx, distinct"] = await off_loop(closed_loop, ports["nginx"], pids["nginx"], seconds, script)
    rate = small["ours"]["requests_per_s"] / 2
    opened = {name: await off_loop(paced, ports[name], rate, seconds) for name in ("direct", "ours", "nginx")}
    await off_loop(warm, folder / "www" / "large")
    large = {name: await off_loop(download, ports[name], pids.get(name, 0)) for name in ("ours", "nginx")}
    return {
        "small": small,
        "ratio_to_nginx": small["ours"]["requests_per_s"] / small["nginx"]["requests_per_s"],
        "ratio_to_nginx_distinct": small["ours, distinct"]["requests_per_s"]
        / small["nginx, distinct"]["requests_per_s"],
        "open_loop": {"rate_per_s": rate, **opened},
        "load_kept_up": all(opened[name]["kept_up"] for name in ("direct", "ours")),
        "added_p99_ms": opened["ours"]["p99_ms"] - opened["direct"]["p99_ms"],
        "download": large,
        "load_average": os.getloadavg()[0],
    }


async def off_loop(function, *arguments):
    return await asyncio.to_thread(function, *arguments)


# ---- the processes


@contextmanager
def nginx(folder: Path, name: str, template: str, port: int, core: int) -> Iterator[int]:
    config = folder / f"{name}.conf"
    config.write_text(template.format(dir=folder, port=port, reply=REPLY.decode(), buffering="on"))
    argv = [
        "taskset",
        "-c",
        str(core),
        "nginx",
        "-c",
        str(config),
        "-p",
        str(folder),
        "-e",
        str(folder / f"{name}.log"),
    ]
    with process(argv, port) as master:
        yield worker_of(master)


@contextmanager
def haproxy(folder: Path, port: int) -> Iterator[int]:
    config = folder / "haproxy.cfg"
    config.write_text(HAPROXY.format(dir=folder, port=port))
    with process(["taskset", "-c", str(PROXY_CORE), "haproxy", "-db", "-f", str(config)], port) as pid:
        yield pid


@contextmanager
def process(argv: list[str], port: int) -> Iterator[int]:
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_port(port, child)
        yield child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(10)


def worker_of(master: int) -> int:
    """nginx serves from a child of its master."""
    for _ in range(100):
        found = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.01)
    raise RuntimeError("nginx has no worker")


async def start_ingress(folder: Path, crew: Crew) -> tuple[children.Child, str]:
    """The real process, and a feed for it with one sandbox whose guest is the upstream."""
    data = folder / "data"
    (data / "run").mkdir(parents=True, mode=0o700)
    (data / "seed").write_text("07" * 32)
    store = Store(MemoryLog(), SystemClock())
    await store.open()
    spec = SandboxSpec(
        id=SANDBOX, team="default", template="base", build="b", limits=Limits(), created_at=0.0, end_at=0.0
    )
    status = SandboxStatus(
        id=SANDBOX,
        phase=Phase.READY,
        node="n",
        team="default",
        pid=1,
        start_ticks=1,
        guest_socket=str(folder / "up.sock"),
    )
    await store.put(keys.SANDBOX_SPEC + SANDBOX, msgspec.json.encode(spec), by="api")
    await store.put(keys.SANDBOX_STATUS + SANDBOX, msgspec.json.encode(status), by="node")
    feed = FeedServer(LocalSource(store), data / "run" / "feed.sock", prefixes=[keys.SANDBOX_SPEC, keys.SANDBOX_STATUS])
    await feed.serve(crew)
    argv = ["taskset", "-c", str(PROXY_CORE), *children.module("penstock.run.ingress")]
    argv += ["--data", str(data), "--listen", "127.0.0.1:0", "--domain", "bench.localhost"]
    child = await children.start(
        "ingress", argv, pid_file=data / "run" / "ingress.json", log=data / "run" / "ingress.log"
    )
    return child, json.loads((data / "run" / "ingress.json").read_text())["url"]


# ---- measurements


def closed_loop(port: int, pid: int, seconds: int, script: Path | None) -> dict[str, float]:
    """`wrk` with CONNECTIONS connections: as fast as it goes."""
    argv = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency"]
    for name, value in (ROUTING | SDK).items():
        argv += ["-H", f"{name}: {value}"]
    if script is not None:
        argv += ["-s", str(script)]
    before = cpu_ns(pid)
    text = subprocess.run([*argv, f"http://127.0.0.1:{port}/x"], capture_output=True, text=True, check=True).stdout
    spent_ns = cpu_ns(pid) - before
    done = int(next(line for line in text.splitlines() if "requests in" in line).split()[0])
    bad = next((line for line in text.splitlines() if "Non-2xx" in line or "Socket errors" in line), "")
    if bad:
        raise RuntimeError(f"port {port}: {bad.strip()}")
    rate = float(next(line for line in text.splitlines() if line.startswith("Requests/sec")).split()[1])
    return {"requests_per_s": rate, "cpu_us_per_request": spent_ns / 1000 / done}


def paced(port: int, rate: float, seconds: int) -> dict[str, float]:
    """The open loop, and again while it was the load that did not keep up; of several bad ones the least late."""
    request = b"GET /x HTTP/1.1\r\nHost: localhost\r\n"
    request += b"".join(f"{name}: {value}\r\n".encode() for name, value in (ROUTING | SDK).items()) + b"\r\n"
    rows: list[dict[str, float]] = []
    while len(rows) < OPEN_LOOP_TRIES and not (rows and rows[-1]["kept_up"]):
        rows.append(open_loop.measure(port, rate, seconds, LOAD_CORE, request))
    return {**min(rows, key=lambda row: row["late_p99_ms"]), "tries": len(rows)}


def warm(file: Path) -> None:
    with file.open("rb", buffering=0) as reader:
        while reader.read(1 << 20):
            pass


def download(port: int, pid: int) -> dict[str, float]:
    before, began = cpu_ns(pid), time.perf_counter()
    argv = ["curl", "-s", "-o", "/dev/null", "-w", "%{size_download}"]
    for name, value in ROUTING.items():
        argv += ["-H", f"{name}: {value}"]
    size = subprocess.run([*argv, f"http://127.0.0.1:{port}/large"], capture_output=True, text=True, check=True).stdout
    took_s, spent_ns = time.perf_counter() - began, cpu_ns(pid) - before
    if int(size) != LARGE_BYTES:
        raise RuntimeError(f"{size} bytes came of {LARGE_BYTES}")
    return {"mb_per_s": LARGE_BYTES / 1e6 / took_s, "cpu_us_per_mib": spent_ns / 1000 / (LARGE_BYTES / 2**20)}


def cpu_ns(pid: int) -> int:
    if not pid:
        return 0
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def free_port() -> int:
    for _ in range(100):
        port = random.randrange(20000, 32000)  # below the ephemeral range, so that nobody is given it meanwhile
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RuntimeError("no free port")


def wait_port(port: int, child: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        if child.poll() is not None:
            raise RuntimeError(f"{child.args} ended with {child.returncode}")
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"{child.args} does not listen on {port}")


def table(result: dict) -> str:
    lines = [f"{'path':18}{'requests/s':>12}{'CPU us/request':>16}"]
    for name, row in result["small"].items():
        lines.append(f"{name:18}{row['requests_per_s']:12.0f}{row['cpu_us_per_request']:16.1f}")
    lines += [
        f"ours / nginx: {result['ratio_to_nginx']:.2f}   with distinct heads: {result['ratio_to_nginx_distinct']:.2f}",
        f"open loop at {result['open_loop']['rate_per_s']:.0f}/s, ms:",
    ]
    for name in ("direct", "ours", "nginx"):
        row = result["open_loop"][name]
        lines.append(
            f"  {name:8} p50 {row['p50_ms']:.3f}  p99 {row['p99_ms']:.3f}  p99.9 {row['p999_ms']:.3f}"
            f"   answered {row['answered']} of {row['due']} due; load late by p99 {row['late_p99_ms']:.3f},"
            f" {row['load_core_share']:.0%} of its core, run {row['tries']}"
        )
    lines.append(f"added p99 by ours: {result['added_p99_ms']:.3f} ms")
    if not result["load_kept_up"]:
        lines.append("  NO RESULT: the load did not keep up with the clock, so this is its own delay as well")
    for name, row in result["download"].items():
        lines.append(f"1 GiB through {name}: {row['mb_per_s']:.0f} MB/s, {row['cpu_us_per_mib']:.0f} us CPU per MiB")
    lines.append(f"load average at the end: {result['load_average']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
