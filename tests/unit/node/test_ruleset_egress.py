"""From EgressRules to firewall elements, without a kernel."""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.model.errors import Invalid
from penstock.model.sandbox import EgressRules
from penstock.node import ruleset
from penstock.node.egress_rules import PRIVATE, Egress, Range, compile_rules, merge, subtract


def compiled(*, private: bool = False, **rules: object) -> Egress:
    return compile_rules(EgressRules(**rules), allow_private=private)  # type: ignore[arg-type]


def span(cidr: str) -> Range:
    network = ipaddress.IPv4Network(cidr)
    return Range(int(network[0]), int(network[-1]))


def test_the_default_is_the_open_internet() -> None:
    assert compiled() == Egress(open=True)


@pytest.mark.parametrize(
    "rules", [{"internet": False}, {"deny": ("0.0.0.0/0",)}, {"deny": ("0.0.0.0/1", "128.0.0.0/1")}]
)
def test_no_internet_and_denying_everything_are_the_same(rules: dict[str, object]) -> None:
    assert compiled(**rules) == Egress(open=False)


def test_addresses_and_overlapping_ranges_become_disjoint() -> None:
    rules = compiled(deny=("203.0.113.7", "203.0.113.0/28", "203.0.113.16/28", "198.51.100.1"))
    assert rules.deny == (span("198.51.100.1/32"), span("203.0.113.0/27"))


def test_host_bits_are_ignored_and_duplicates_merged() -> None:
    assert compiled(allow=("1.1.1.1/24", "1.1.1.0/24", " 1.1.1.9 ")).allow == (span("1.1.1.0/24"),)


def test_private_ranges_are_cut_out_of_allow_unless_the_node_permits() -> None:
    assert compiled(allow=("10.0.0.0/8", "169.254.169.254", "127.0.0.1")).allow == ()
    assert compiled(allow=("8.0.0.0/6",)).allow == (
        Range(span("8.0.0.0/8").first, span("9.0.0.0/8").last),
        span("11.0.0.0/8"),
    )
    assert compiled(private=True, allow=("10.0.0.0/8",)).allow == (span("10.0.0.0/8"),)


def test_allowing_everything_leaves_the_public_addresses() -> None:
    allow = compiled(internet=False, allow=("0.0.0.0/0",)).allow
    assert not any(each.first <= int(ipaddress.IPv4Address("169.254.169.254")) <= each.last for each in allow)
    assert any(each.first <= int(ipaddress.IPv4Address("8.8.8.8")) <= each.last for each in allow)


def test_ipv6_entries_mean_nothing_here() -> None:
    assert compiled(allow=("2001:db8::1",), deny=("::/0",)) == Egress(open=True)


@pytest.mark.parametrize(
    ("field", "entry"), [("allow", "example.com"), ("deny", "1.2.3"), ("deny", "1.2.3.4/33"), ("deny", "")]
)
def test_nonsense_is_named(field: str, entry: str) -> None:
    with pytest.raises(Invalid, match=field):
        compiled(**{field: (entry,)})


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(Invalid, match="more than 1000"):
        compiled(deny=tuple(str(ipaddress.IPv4Address(0x0B00_0000 + 2 * i)) for i in range(1001)))


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("example.com", "example.com", True),
        ("example.com", "EXAMPLE.com", True),
        ("Example.COM.", "example.com", True),
        ("example.com", "www.example.com", False),
        ("example.com", "notexample.com", False),
        ("*.example.com", "www.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "notexample.com", False),
        ("*.example.com", ".example.com", False),
        ("*", "anything.test", True),
    ],
)
def test_domains(pattern: str, name: str, matches: bool) -> None:
    rules = compiled(internet=False, allow_domains=(pattern,))
    assert rules.names(name) is matches
    assert rules.resolves(name) is matches
    assert compiled(allow_domains=(pattern,)).resolves("other.test")


def test_an_allowed_name_does_not_open_a_private_address() -> None:
    rules = compiled(internet=False, allow_domains=("*",))
    assert rules.learns("93.184.216.34")
    assert not rules.learns("169.254.169.254")
    assert not rules.learns("10.200.0.1")
    assert compiled(private=True, allow_domains=("*",)).learns("10.9.9.9")


ranges = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 255)).map(lambda ends: Range(min(ends), max(ends))), max_size=8
)


def members(spans: tuple[Range, ...] | list[Range]) -> set[int]:
    return {value for each in spans for value in range(each.first, each.last + 1)}


@given(ranges)
def test_merging_keeps_the_addresses_and_leaves_gaps(given_ranges: list[Range]) -> None:
    merged = merge(given_ranges)
    assert members(merged) == members(given_ranges)
    assert all(one.last + 1 < two.first for one, two in itertools.pairwise(merged))


@given(ranges, ranges)
def test_subtraction_is_that_of_sets(one: list[Range], two: list[Range]) -> None:
    assert members(subtract(one, two)) == members(one) - members(two)


def test_private_holds_what_must_never_be_reached() -> None:
    for address in (
        "10.0.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "127.0.0.1",
        "100.64.0.1",
        "224.0.0.1",
    ):
        value = int(ipaddress.IPv4Address(address))
        assert any(each.first <= value <= each.last for each in PRIVATE), address


def test_the_texts_name_their_installation_only_on_the_host() -> None:
    assert "penstock_abc123" in ruleset.host_text("abc123")
    assert len(ruleset.host_link("abc123")) <= 15
    assert "abc123" not in ruleset.router_text()
    assert ruleset.router_digest() == ruleset.router_digest()
