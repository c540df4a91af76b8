"""Which images a node keeps: those that a snapshot in the store names, and those somebody here is about to name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from penstock.core.crew import Crew
from penstock.feed.source import Source
from penstock.feed.view import View
from penstock.model import keys
from penstock.model.snapshot import Snapshot
from penstock.node.ports import Disks
from penstock.node.report import Reporter
from penstock.node.supervisor import Supervisor


class Images:
    """Removes an image when its snapshot's record goes, and now and then what nobody names.

    Until the snapshots of the store are known every image may be one's: nothing is removed before `follow`.
    """

    def __init__(
        self, source: Source, disks: Disks, reporter: Reporter, supervised: Callable[[], Iterable[Supervisor]]
    ) -> None:
        self._disks, self._reporter, self._supervised = disks, reporter, supervised
        self._snapshots: View[Snapshot] = View(source, keys.SNAPSHOT, _decode)
        self._known = False

    async def follow(self, crew: Crew) -> None:
        self._snapshots.subscribe(self._on_snapshot)
        await self._snapshots.start(crew)
        self._known = True

    def sweep(self) -> int:
        """Remove what no snapshot names and no sandbox here is about to become. How many it were."""
        if not self._known:
            return 0
        named = {*self._snapshots.ids(), *self._reporter.kept}
        for one in self._supervised():
            named.add(str(one.undo.keep))
            if one.spec is not None and one.spec.checkpoint is not None:
                named.add(one.spec.checkpoint.id)
        orphans = self._disks.list_images() - named
        for image in orphans:
            self._disks.remove_image(image)
        return len(orphans)

    def _on_snapshot(self, snapshot: str, found: Snapshot | None) -> None:
        if found is None:
            self._reporter.kept.discard(snapshot)
            self._disks.remove_image(snapshot)


_decode: Final = msgspec.json.Decoder(Snapshot).decode
