"""What a new installation needs before its first sandbox: the template `base` and the first API key."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import threading
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.core.clock import Clock
from penstock.core.settle import settle
from penstock.model import keys
from penstock.model.ids import BuildId, KeyId, TemplateId, mint
from penstock.model.team import TEAM_DEFAULT, ApiKey
from penstock.model.template import TEMPLATE_BASE, Build, Layer, Template
from penstock.node.linux.base import BuildStopped, build_base
from penstock.run.datafolder import DataFolder
from penstock.run.journal import Journal
from penstock.store.store import Put, Store
from penstock.wire import tokens

STOPPED_S: Final = 30.0  # some thousand files are unlinked in half a second

_encode = msgspec.json.encode


async def base_layer(folder: DataFolder, say: Callable[[str], None]) -> Layer:
    """The layer of `base` for the machine's packages of now; the same one when nothing changed.

    On a thread: it reads and links files for seconds the first time. Not bounded by a deadline of ours, since its
    work is bounded by the whitelist; when cancelled, the thread is stopped and removes what it has half made.
    """
    loop = asyncio.get_running_loop()

    def progress(text: str) -> None:
        loop.call_soon_threadsafe(say, text)

    stop = threading.Event()
    building = loop.run_in_executor(None, lambda: build_base(str(folder.layers), progress=progress, stop=stop))
    try:
        return await asyncio.shield(building)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(BuildStopped):
            await settle(building, within_s=STOPPED_S, what="the end of the stopped build of base")
        raise


async def first_records(
    store: Store, clock: Clock, rng: random.Random, folder: DataFolder, layer: Layer, journal: Journal
) -> None:
    """Write what is missing: a new build when the layer is new, and the record of the folder's own API key.

    A build is never changed: sandboxes of an older one keep it, new sandboxes get the new one.
    """
    build = Build(id=_build_id(layer), template=TemplateId(TEMPLATE_BASE), layers=(layer,), created_at=clock.wall())
    template = Template(id=TemplateId(TEMPLATE_BASE), names=(TEMPLATE_BASE,), build=build.id, created_at=clock.wall())
    puts: list[Put] = []
    if store.get(keys.BUILD + build.id) is None:
        puts.append(Put(keys.BUILD + build.id, _encode(build), labels={"template": TEMPLATE_BASE}, expect=0))
        why = "the machine's packages changed" if store.list(keys.BUILD).records else "a new installation"
        puts.append(journal.line("build.made", why, subject=build.id, template=TEMPLATE_BASE, layer=layer.digest))
    present = store.get(keys.TEMPLATE + template.id)
    if present is None:
        puts.append(Put(keys.TEMPLATE + template.id, _encode(template), labels={"name": TEMPLATE_BASE}, expect=0))
    elif msgspec.json.decode(present.value, type=Template).build != build.id:
        puts.append(Put(present.key, _encode(template), expect=present.mod_revision))
    key = _first_key(clock, rng, folder)
    if not store.list(keys.API_KEY, labels={"hash": key.hash}).records:
        labels = {"hash": key.hash, "team": key.team}
        puts.append(Put(keys.API_KEY + key.id, _encode(key), labels=labels, expect=0))
        why = "the data folder's own key"
        puts.append(journal.line("key.made", why, subject=key.id, team=key.team, name=key.name))
    if puts:
        await store.commit(puts, by="run", durable=True)


def _build_id(layer: Layer) -> BuildId:
    """Derived from the content, so that the same layer is the same build on every start."""
    return BuildId(hashlib.sha256(f"build {layer.digest}".encode()).hexdigest()[:20])


def _first_key(clock: Clock, rng: random.Random, folder: DataFolder) -> ApiKey:
    secret = folder.api_key
    digest = tokens.hash_key(secret)
    assert digest is not None, "the folder made a well-formed key"
    return ApiKey(
        id=KeyId(mint(rng, 12)),
        team=TEAM_DEFAULT,
        name="first",
        hash=digest,
        prefix=secret[:6],
        suffix=secret[-4:],
        created_at=clock.wall(),
    )
