"""The index leaves nothing behind, and finds by folder and label without looking at the rest."""

from __future__ import annotations

from penstock.model.records import Change, Record
from penstock.store.index import Index, folders


def record(key: str, **labels: str) -> Record:
    return Record(key, b"", labels, 1, 1, 1)


def test_folders_of_a_key() -> None:
    assert folders("a/b/c") == ["a/", "a/b/"]
    assert folders("a") == []
    assert folders("a/b/") == ["a/", "a/b/"]


def test_what_was_deleted_leaves_no_trace() -> None:
    """Ids are never used again, so an empty set per id would grow for ever."""
    index = Index()
    for n in range(100):
        index.apply(Change("put", record(f"a/{n}/x", team=f"t{n}")))
    for n in range(100):
        index.apply(Change("delete", record(f"a/{n}/x", team=f"t{n}")))
    assert len(index) == 0
    assert not index._by_folder
    assert not index._by_label


class Untouchable(dict[str, None]):
    """A set of keys that must not be walked."""

    def __iter__(self) -> object:  # type: ignore[override]
        raise AssertionError("walked what the listing does not return")


def test_a_listing_walks_only_what_it_returns() -> None:
    index = Index()
    for n in range(10):
        index.apply(Change("put", record(f"a/{n}", team="x" if n < 3 else "y")))
        index.apply(Change("put", record(f"b/{n}", team="x")))
    for name in ("b/",):
        index._by_folder[name] = Untouchable(index._by_folder[name])
    for name in (("a/", "team", "y"), ("b/", "team", "x"), ("", "team", "x")):
        index._by_label[name] = Untouchable(index._by_label[name])
    assert [found.key for found in index.list("a/", {"team": "x"})] == ["a/0", "a/1", "a/2"]
    assert len(index.list("a/")) == 10


def test_the_newest_of_a_folder_come_first_and_cost_what_is_taken() -> None:
    index = Index()
    for n in (3, 1, 2):
        index.apply(Change("put", record(f"a/{n}")))
        index.apply(Change("put", record(f"b/{n}")))
    index.apply(Change("put", record("a/3")))  # written again: not created again
    index.apply(Change("delete", record("a/1")))
    assert [found.key for found in index.newest("a/")] == ["a/2", "a/3"]
    assert next(index.newest("b/")).key == "b/2"
    assert list(index.newest("c/")) == []
