"""The network of an installation for looking only: no daemon needed, nothing opened, nothing changed."""

from __future__ import annotations

from typing import NoReturn

from penstock.model.errors import Unsupported
from penstock.model.sandbox import EgressRules
from penstock.node.linux.claims import Claims
from penstock.node.linux.traces import NetworkTraces, read_traces
from penstock.node.ports import Slot


class NetworkAtRest:
    """Adapter of the port `Network` that can list and nothing else; every other method raises Unsupported."""

    def __init__(self, *, installation: str, router_path: str, claims: Claims | None = None) -> None:
        self._installation, self._router_path = installation, router_path
        self._claims = claims or Claims()

    def traces(self) -> NetworkTraces:
        return read_traces(self._installation, self._router_path)

    def list_slots(self) -> set[int]:
        """Slots with a link in the router or an address in its firewall. Blocks for some milliseconds."""
        traces = self.traces()
        block = self._claims.block_of(self._installation)
        found = set(traces.slots)
        if block is not None:
            numbers = (block.number_at(address) for address in traces.addresses)
            found |= {number for number in numbers if number is not None}
        return found

    async def open(self) -> None:
        _refuse()

    async def create_slot(self, number: int) -> Slot:
        _refuse()

    async def destroy_slot(self, number: int, *, within_s: float) -> None:
        _refuse()

    async def apply(self, number: int, rules: EgressRules) -> None:
        _refuse()

    def retake(self, number: int, pid: int) -> Slot:
        _refuse()

    async def close(self, *, destroy: bool) -> None:
        """Nothing to let go of."""


def _refuse() -> NoReturn:
    raise Unsupported("the network was opened for looking only")
