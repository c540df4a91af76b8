"""Metrics of the daemon: what the node tells of itself, and how late its event loop is."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.node.facts import NodeStatistics

LAG_EVERY_S: Final = 0.25
_TOLD: Final = {  # lines of the event log that are counters of their own
    "adopted": "Sandboxes taken up from an earlier daemon",
    "reaped": "Sandboxes released after quarantine",
}


class NodeCollector(Collector):
    """Reads one snapshot of the node at each scrape; nothing is counted twice."""

    def __init__(self, registry: CollectorRegistry, statistics: Callable[[], NodeStatistics]) -> None:
        self._statistics = statistics
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        now = self._statistics()
        yield _gauges("penstock_sandboxes", "Sandboxes on this node by phase", "phase", now.sandboxes)
        ready = {"slots": now.slots.ready, "disks": now.disks.ready}
        yield _gauges("penstock_pool_ready", "Prepared objects ready to be taken", "pool", ready)
        yield GaugeMetricFamily("penstock_starts_running", "Starts under way", now.starts_running)
        yield GaugeMetricFamily("penstock_starts_waiting", "Starts waiting for their turn", now.starts_waiting)
        yield GaugeMetricFamily("penstock_quarantined", "Sandboxes whose release failed", now.quarantined)
        yield GaugeMetricFamily("penstock_quarantined_seconds", "Age of the oldest quarantine", now.quarantined_for_s)
        yield CounterMetricFamily("penstock_release_retries", "Releases tried again", now.release_retries_total)
        leaks = dict(Counter(leak.kind for leak in now.leaks))
        yield _gauges("penstock_leaks", "What the last sweep found and could not remove, by kind", "kind", leaks)
        yield CounterMetricFamily("penstock_creates_ready", "Sandboxes that became ready", now.ready_total)
        yield CounterMetricFamily("penstock_creates_failed", "Sandboxes that never became ready", now.failed_total)
        swept = now.swept_total
        yield _counters("penstock_swept", "Objects and records of nobody that were removed, by kind", "kind", swept)
        yield _counters("penstock_refusals", "Starts refused, by reason", "reason", now.refused_total)
        told = now.told_total
        for name, text in _TOLD.items():
            yield CounterMetricFamily(f"penstock_{name}", text, told.get(f"sandbox.{name}", 0))
        yield _counters("penstock_node_events", "Lines the node told the event log, by kind", "kind", told)
        yield _counters("penstock_ended", "Sandboxes that ended, by reason", "reason", now.ended_total)
        steps = {step: sorted(last)[len(last) // 2] / 1000 for step, last in now.steps_ms.items() if last}
        yield _gauges("penstock_create_step_seconds", "Median of the last creates, by step", "step", steps)


async def measure_lag(registry: CollectorRegistry) -> None:
    """Until cancelled: how late the loop wakes a sleeper. A stall of one room is a stall of all."""
    lag = Histogram(
        "penstock_loop_lag_seconds",
        "Delay of a timer of the daemon's event loop",
        registry=registry,
        buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
    )
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        lag.observe(max(0.0, loop.time() - due))


def _gauges(name: str, text: str, label: str, values: dict[str, int] | dict[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counters(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
