"""What the ingress counts. Plain integers on the path; `prometheus-client` reads them when asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

# Upper bounds in seconds. A dial takes about 0.1 ms; a closed port is given up after 0.2 s.
DIAL_BOUNDS_S: Final = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.02, 0.1, 0.3, 1.0, 5.0, 30.0)


class Tally:
    """Counted since the start of the process. Labels are closed sets: no sandbox id, path or header is one."""

    def __init__(self) -> None:
        self.connections = 0  # accepted
        self.requests: Counter[str] = Counter()  # by result
        self.bytes_from_clients = 0
        self.bytes_to_clients = 0
        self.resets = 0  # clients cut by RST: their sandbox or its server died in the middle of a response
        self.retries = 0  # requests sent again because a kept connection had died
        self.evicted = 0  # idle connections closed to make room
        self.dials: Counter[str] = Counter()  # by result
        self.dial_s = 0.0
        self.dial_buckets = [0] * (len(DIAL_BOUNDS_S) + 1)
        self.lag_s = 0.0  # how late the loop was at the last look
        self.lag_s_max = 0.0

    def dialled(self, result: str, took_s: float) -> None:
        self.dials[result] += 1
        self.dial_s += took_s
        for at, bound in enumerate(DIAL_BOUNDS_S):
            if took_s <= bound:
                self.dial_buckets[at] += 1
                return
        self.dial_buckets[-1] += 1

    def lagged(self, lag_s: float) -> None:
        self.lag_s = lag_s
        self.lag_s_max = max(self.lag_s_max, lag_s)


class Gauges(dict[str, Callable[[], float]]):
    """Named present values, asked for at each scrape: connections open, routes, feed connected, …"""


class TallyCollector(Collector):
    def __init__(self, tally: Tally, gauges: Gauges) -> None:
        self._tally, self._gauges = tally, gauges

    def collect(self) -> Iterator[Metric]:
        tally = self._tally
        yield _counter("connections", "client connections accepted", tally.connections)
        yield _counter("bytes_from_clients", "bytes received from clients", tally.bytes_from_clients)
        yield _counter("bytes_to_clients", "bytes sent to clients", tally.bytes_to_clients)
        yield _counter("resets", "clients reset because their sandbox died in the middle of a response", tally.resets)
        yield _counter("retries", "requests sent again after a kept connection had died", tally.retries)
        yield _counter("evicted", "idle connections closed to make room", tally.evicted)
        yield _counters("requests", "requests by result", tally.requests)
        yield _counters("dials", "connections made into sandboxes, by result", tally.dials)
        yield self._dial_latency()
        yield _gauge("loop_lag_seconds", "how late the event loop was at the last look", tally.lag_s)
        yield _gauge("loop_lag_seconds_max", "the worst lateness since the start", tally.lag_s_max)
        for name, ask in self._gauges.items():
            yield _gauge(name, name.replace("_", " "), ask())

    def _dial_latency(self) -> Metric:
        metric = HistogramMetricFamily("penstock_ingress_dial_seconds", "time to connect into a sandbox")
        buckets, total = [], 0
        for bound, count in zip((*map(str, DIAL_BOUNDS_S), "+Inf"), self._tally.dial_buckets, strict=True):
            total += count
            buckets.append((bound, float(total)))
        metric.add_metric([], buckets, self._tally.dial_s)
        return metric


def expose(tally: Tally, gauges: Gauges) -> bytes:
    """The metrics as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(TallyCollector(tally, gauges))
    return generate_latest(registry)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"penstock_ingress_{name}", what, value=value)


def _counters(name: str, what: str, values: Counter[str]) -> Metric:
    metric = CounterMetricFamily(f"penstock_ingress_{name}", what, labels=["result"])
    for result, value in sorted(values.items()):
        metric.add_metric([result], value)
    return metric


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"penstock_ingress_{name}", what, value=value)
