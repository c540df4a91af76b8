"""The ingress process: `python -m penstock.run.ingress --data DIR --listen HOST:PORT --domain NAME [--tls HOST:PORT]`.

It lives apart from the daemon and survives it: what it knows of sandboxes it keeps while the feed is away. It says
where it listens in `<data>/run/ingress.json`, with its pid and start time. SIGTERM: accept nothing more, let responses
end for `--grace` seconds, cut the rest, exit 0. No argument is a secret: the seed of tokens is read from the folder.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import signal
import socket
import ssl
from pathlib import Path
from typing import Final

import uvloop
from structlog import get_logger

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.core.errors import PenstockError
from penstock.feed.remote import RemoteSource
from penstock.ingress.authority import issue
from penstock.ingress.dial import LinuxDialler
from penstock.ingress.follow import Follower
from penstock.ingress.hub import Hub, descriptor_budget
from penstock.ingress.listen import Listeners, address, bind
from penstock.ingress.netns import Namespaces
from penstock.ingress.sandbox_tokens import Tokens
from penstock.ingress.table import Table
from penstock.ingress.tally import Gauges
from penstock.model.errors import Unavailable
from penstock.run import children
from penstock.run.datafolder import DataFolder
from penstock.run.logs import configure
from penstock.run.settings import host_port

FIRST_TABLE_S: Final = 5.0  # then we serve without: 503 until the feed has answered
RENEW_EVERY_S: Final = 3600.0
GRACE_S: Final = 3.0
GC_THRESHOLDS: Final = (20_000, 20, 20)

log = get_logger("penstock.ingress")


def main() -> None:
    arguments = _arguments()
    configure(arguments.log_level)
    # What the modules made lives for ever, and requests make few cycles: look for some rarely.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_serve(arguments))
        except PenstockError as error:
            raise SystemExit(str(error)) from None


async def _serve(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    folder = DataFolder(arguments.data)
    plain = _bind(arguments.listen, setting="ingress")
    secure = _bind(arguments.tls, setting="tls") if arguments.tls else None
    namespaces, gauges, table = Namespaces(), Gauges(), Table()
    async with Crew("ingress", on_error=_log_failure) as crew:
        source = RemoteSource(folder.feed_socket, rng=random.Random())
        follower = Follower(
            source,
            table,
            on_trouble=lambda trouble: log.error("feed failed; reading it anew", exc_info=trouble),
        )
        hub = Hub(
            loop=loop,
            table=table,
            dialler=LinuxDialler(namespaces),
            tokens=Tokens(folder.seed),
            crew=crew,
            descriptors_max=descriptor_budget(),
            gauges=gauges,
            catch_up=follower.catch_up,
            ask=source.demand,
            wall=SystemClock().wall,
        )
        crew.spawn(follower.follow(), name="follower")
        gauges["feed_connected"] = lambda: follower.connected
        gauges["namespaces_held"] = lambda: len(namespaces)
        if not await follower.wait_complete(within_s=FIRST_TABLE_S):
            log.warning("the daemon's feed does not answer; answering 503 until it does")
        listeners = Listeners(hub)
        certificate = _Certificate(arguments, folder.tls)
        if secure is not None:
            listeners.serve_tls(secure, certificate.context)
            crew.spawn(certificate.renew(), name="certificate")
        await listeners.serve(plain)
        _announce(folder, plain, secure, certificate, arguments.domain)
        log.info("serving", listen=address(plain), tls=address(secure) if secure else "", routes=len(table.routes))
        await stop.wait()
        listeners.close()
        cut = await hub.stop(grace_s=arguments.grace)
        log.info("stopped", connections_cut=cut)
    namespaces.close()


def _bind(listen: str, *, setting: str) -> socket.socket:
    try:
        return bind(*host_port(listen, field=setting))
    except OSError as error:
        raise Unavailable(
            "cannot listen", which=listen, why=str(error), now=f"choose another with --{setting}"
        ) from error


class _Certificate:
    """The TLS context, and where its certificate comes from: given files, or the local authority."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._folder, self._domain = folder, arguments.domain
        self._given = (arguments.cert, arguments.key) if arguments.cert else None
        self.authority = ""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        if arguments.tls:
            try:
                self._load()
            except (OSError, ValueError) as error:
                raise Unavailable("the certificate cannot be loaded", why=str(error), now="see tls_cert") from error

    async def renew(self) -> None:
        """Look now and then, for ever: a leaf near its end is made anew, given files are read again."""
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            try:
                self._load()
            except (OSError, ValueError) as error:
                log.error("certificate could not be renewed", why=str(error))  # Safe: the loaded one serves on.

    def _load(self) -> None:
        if self._given is not None:
            self.context.load_cert_chain(*self._given)
            return
        issued = issue(self._folder, self._domain, SystemClock().wall())
        self.context.load_cert_chain(issued.leaf)
        self.authority = issued.authority


def _announce(
    folder: DataFolder, plain: socket.socket, secure: socket.socket | None, certificate: _Certificate, domain: str
) -> None:
    children.announce(
        folder.ingress_file,
        url=f"http://{address(plain)}",
        tls_url=f"https://{address(secure)}" if secure is not None else "",
        ca_file=certificate.authority,
        domain=domain,
    )


def _log_failure(task: str, error: BaseException) -> None:
    """A task of one connection failed: that connection is over, the others go on."""
    log.error("task failed", task=task, exc_info=error)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="penstock-ingress", description=__doc__)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--domain", required=True, metavar="NAME")
    parser.add_argument("--tls", default="", metavar="HOST:PORT")
    parser.add_argument("--cert", default="", metavar="FILE", help="PEM; without it a local authority makes one")
    parser.add_argument("--key", default="", metavar="FILE")
    parser.add_argument("--grace", type=float, default=GRACE_S, metavar="SECONDS")
    parser.add_argument("--log-level", default="info")
    return parser.parse_args()


if __name__ == "__main__":
    main()
