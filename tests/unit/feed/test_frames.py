"""The feed's frames: any message survives any cutting of the stream into pieces."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.feed.frames import BrokenFrame, End, Event, FromServer, Link, Page, Refusal, Started, frame
from penstock.model.records import Batch, Change, Record

RECORDS = st.builds(
    Record,
    key=st.text(max_size=5),
    value=st.binary(max_size=300),
    labels=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    create_revision=st.integers(0, 2**63),
    mod_revision=st.integers(0, 2**63),
    version=st.integers(0, 2**31),
    lease=st.integers(0, 2**63),
)
CHANGES = st.builds(Change, kind=st.sampled_from(["put", "delete"]), record=RECORDS)
MESSAGES = st.one_of(
    st.builds(Page, records=st.lists(RECORDS, max_size=3).map(tuple)),
    st.builds(End, revision=st.integers(0, 2**63)),
    st.just(Started()),
    st.builds(Event, batch=st.builds(Batch, revision=st.integers(0, 2**63), changes=st.tuples(CHANGES))),
    st.builds(Refusal, code=st.text(max_size=9), why=st.text(max_size=9), asked=st.integers(0, 9)),
)
decoder = msgspec.msgpack.Decoder(FromServer)


def link_of(reader: asyncio.StreamReader) -> Link:
    return Link(reader, None)  # type: ignore[arg-type]


@given(st.lists(MESSAGES, max_size=4), st.integers(1, 40))
def test_messages_survive_any_cut(messages: list[FromServer], piece: int) -> None:
    stream = b"".join(frame(message) for message in messages)

    async def receive() -> list[FromServer]:
        reader = asyncio.StreamReader()
        link, found = link_of(reader), []
        for start in range(0, len(stream), piece):
            reader.feed_data(stream[start : start + piece])
            if start % 3 == 0:
                await asyncio.sleep(0)
        reader.feed_eof()
        while (message := await link.receive(decoder)) is not None:
            found.append(message)
        return found

    assert asyncio.run(receive()) == messages


@given(st.binary(max_size=40))
def test_noise_is_refused_or_waited_for_and_nothing_else(noise: bytes) -> None:
    async def receive() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(noise)
        reader.feed_eof()
        link = link_of(reader)
        try:
            while await link.receive(decoder) is not None:
                pass
        except BrokenFrame:
            pass

    asyncio.run(receive())


async def test_a_receive_that_was_cancelled_in_the_middle_of_a_frame_loses_nothing() -> None:
    reader = asyncio.StreamReader()
    link, data = link_of(reader), frame(End(7))
    reader.feed_data(data[:5])
    receiving = asyncio.ensure_future(link.receive(decoder))
    await asyncio.sleep(0.01)
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    reader.feed_data(data[5:])
    assert await link.receive(decoder) == End(7)
