"""What a store on disk holds, read beside its daemon or without one: takes no lock, writes nothing, trusts no bound.

For commands that must work when nobody serves. A daemon at work reads its own memory instead.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from penstock.model.records import Batch, Record
from penstock.store import sqlitefile
from penstock.store.errors import StoreDamaged

_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_group = msgspec.msgpack.Decoder(list[Batch]).decode


def glimpse(path: Path, prefix: str) -> dict[str, Record]:
    """The records below `prefix` as last committed, by key. Blocks: it reads the whole log, some 10 ms per MiB.

    Raises FileNotFoundError, StoreDamaged, or sqlite3.Error.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    db = sqlitefile.connect_reader(path)
    try:
        db.execute("BEGIN")  # base and log of one instant
        rows = db.execute("SELECT key, body, crc FROM base WHERE substr(key, 1, ?) = ?", (len(prefix), prefix))
        found = {key: _decode_record(sqlitefile.checked(body, crc, key)) for key, body, crc in rows}
        for first, body, crc in db.execute("SELECT first, body, crc FROM log ORDER BY first"):
            for batch in _decode_group(sqlitefile.checked(body, crc, f"revision {first}")):
                for change in batch.changes:
                    record = change.record
                    if record.key.startswith(prefix):
                        found[record.key] = record
        db.execute("COMMIT")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreDamaged("store is damaged", which=str(path), why=str(error)) from error
    finally:
        db.close()
    return {key: record for key, record in found.items() if record.version}
