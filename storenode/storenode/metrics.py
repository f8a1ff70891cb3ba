"""What a node counts, and where Prometheus fetches it.

Law: counting costs a dictionary update, under a microsecond and without a lock in the event loop; everything dear happens when somebody
asks. Labels come from closed sets (route templates, methods, error classes), never from what a client wrote, so nobody can make the
table grow. No label names a file, a vault or a key.

prometheus_client is the optional part ``medshard[node]``: without it a node counts all the same and serves no /metrics.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Final

from aiohttp import web

from medshard_protocol.audit import Claim, Verdict
from medshard_protocol.errors import Unavailable
from medshard_protocol.repairorder import Reason as RepairReason
from medshard_protocol.rights import Reason
from storenode.config import Config
from storenode.evidence import kinds

repair_outcomes: Final = ("done", "failed")
exchange_causes: Final = ("broken", "wrong")
methods: Final = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE"})
seconds_buckets: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
content_type: Final = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How often something took how long. Not locked."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(seconds_buckets) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(seconds_buckets, seconds)] += 1
        self.total += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """Give (upper bound, how many up to it), as Prometheus wants it."""
        running, buckets = 0, []
        for bound, count in zip((*map(str, seconds_buckets), "+Inf"), self.counts, strict=True):
            running += count
            buckets.append((bound, float(running)))
        return buckets


class Metrics:
    """A node's counters. ``fsync`` may be called from any thread, everything else from the event loop."""

    def __init__(self) -> None:
        self.started = time.time()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._took: dict[tuple[str, str], Histogram] = {}
        self._refused: Counter[str] = Counter()
        self._denied: Counter[str] = Counter()
        self._repairs_refused: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()
        self._exchanged: Counter[str] = Counter()
        self._sums = 0
        self._repaired_bytes = 0
        self._audits: Counter[str] = Counter()
        self._audits_answered: Counter[str] = Counter()
        self._tags = 0
        self._scrubbed = {"shards": 0, "bytes": 0, "bad": 0}
        self._emergencies = 0
        self._bytes = {"in": 0, "out": 0}
        self._swept = 0
        self._fsync = Histogram()
        self._fsync_lock = threading.Lock()
        self._gauges: dict[str, float] = {}
        self._entries: dict[str, int] = {}
        self._evidence: dict[str, int] = {}
        self._findings: dict[str, int] = {}
        self._bad_shards: dict[str, int] = {}
        self._expiries: dict[str, float] = {}

    def request(self, method: str, route: str, status: int, seconds: float, bytes_in: int, bytes_out: int = 0) -> None:
        """Count an answered request. ``route`` is the route's template, never the path."""
        if method not in methods:
            method = "other"
        self._requests[method, route, status] += 1
        histogram = self._took.get((method, route))
        if histogram is None:
            histogram = self._took[method, route] = Histogram()
        histogram.observe(seconds)
        self._bytes["in"] += bytes_in
        self._bytes["out"] += bytes_out

    def refused(self, reason: str) -> None:
        """Count a request that was not granted, by the class of the error."""
        self._refused[reason] += 1

    def denied(self, reason: Reason) -> None:
        """Count a read that the gate refused, by the reason."""
        self._denied[reason.value] += 1

    def repair_refused(self, reason: RepairReason) -> None:
        """Count a request for help in a repair that this node refused."""
        self._repairs_refused[reason.value] += 1

    def repaired(self, outcome: str) -> None:
        """Count a repair that this node ordered, and that ended."""
        self._repairs[outcome] += 1

    def helper_exchanged(self, cause: str) -> None:
        """Count a helper that this node left out: its line broke, or the shard came out wrong with it and right without it."""
        self._exchanged[cause] += 1

    def summed(self, size: int) -> None:
        """Count bytes of sums that this node gave to repairs."""
        self._sums += size

    def repaired_bytes(self, size: int) -> None:
        """Count bytes of shards that this node took over."""
        self._repaired_bytes += size

    def tended(self, queue: int, lowest_margin: int | None, stuck: int) -> None:
        """Set how many files this node knows to be short of shards, the lowest margin of one, and how many nobody may mend."""
        self._gauges |= {"medshard_repair_queue": queue, "medshard_repair_stuck_files": stuck}
        if lowest_margin is None:
            self._gauges.pop("medshard_repair_lowest_margin", None)
        else:
            self._gauges["medshard_repair_lowest_margin"] = lowest_margin

    def draining(self, left: int) -> None:
        """Set how many shards this node still has to hand over before it may leave."""
        self._gauges["medshard_drain_left_shards"] = left

    def audited(self, verdict: Verdict) -> None:
        """Count one audit of another node's shard."""
        self._audits[verdict.value] += 1

    def audit_answered(self, claim: str, *, tagged: bool) -> None:
        """Count a challenge that this node answered."""
        self._audits_answered[claim] += 1
        self._tags += tagged

    def scrubbed(self, shards: int, size: int, bad: int) -> None:
        """Count own shards that were read again, and those of them that are not what they were."""
        for name, count in (("shards", shards), ("bytes", size), ("bad", bad)):
            self._scrubbed[name] += count

    def findings(self, bad: Mapping[Verdict, int], silent: int) -> None:
        """Set how many shards are known to be bad, and how many nodes have been silent for too long."""
        self._bad_shards = {verdict.value: count for verdict, count in bad.items()}
        self._gauges["medshard_audit_silent_nodes"] = silent

    def emergency(self) -> None:
        """Count a read that was served in an emergency."""
        self._emergencies += 1

    def emergencies_waiting(self, count: int) -> None:
        """Set how many emergency reads the ledger does not have yet."""
        self._gauges["medshard_emergency_reads_waiting"] = count

    def fsync(self, seconds: float) -> None:
        """Count one fsync of a shard."""
        with self._fsync_lock:
            self._fsync.observe(seconds)

    def swept(self, shards: int) -> None:
        """Count shards deleted because they were never registered."""
        self._swept += shards

    def stored(self, shards: int, manifests: int, used_bytes: int, free_bytes: int) -> None:
        """Set what is stored now."""
        self._gauges |= {
            "medshard_shards": shards,
            "medshard_manifests": manifests,
            "medshard_stored_bytes": used_bytes,
            "medshard_free_bytes": free_bytes,
        }

    def capacity(self, capacity_bytes: int) -> None:
        """Set how much this node may store."""
        self._gauges["medshard_capacity_bytes"] = capacity_bytes

    def certificate(self, name: str, expires: float) -> None:
        """Set when a certificate that this node uses ends, in Unix seconds."""
        self._expiries[name] = expires

    def ledger(self, status: Mapping[str, Any]) -> None:
        """Set what ``Ledger.status()`` says."""
        self._gauges["medshard_ledger_size"] = status.get("size", 0)
        self._gauges["medshard_ledger_published_size"] = status.get("published", 0)
        self._gauges["medshard_ledger_is_sequencer"] = status.get("role") == "sequencer"
        self._gauges["medshard_ledger_epoch"] = status.get("epoch", 0)
        self._gauges["medshard_ledger_lost"] = bool(status.get("lost", False))
        self._gauges["medshard_ledger_left_out_entries"] = status.get("left_out", 0)
        self._entries = {str(kind): int(count) for kind, count in dict(status.get("entries", {})).items()}

    def roster(self, number: int) -> None:
        """Set which roster this node goes by."""
        self._gauges["medshard_roster_number"] = number

    def evidence(self, counts: Mapping[str, int], active: Mapping[str, int] | None = None) -> None:
        """Set how many files of evidence of each kind there are, and about how many mirrors the watch found each kind just now."""
        self._evidence, self._findings = dict(counts), dict(active or {})

    def render(self) -> bytes:
        """Give everything in Prometheus' text format. Raises Unavailable without prometheus_client."""
        try:
            from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
        except ImportError:
            raise Unavailable("/metrics needs prometheus_client", hint="pip install 'medshard[node]'") from None
        registry = CollectorRegistry()
        registry.register(_Collector(self))
        ProcessCollector(registry=registry)
        rendered: bytes = generate_latest(registry)
        return rendered

    def families(self) -> Iterable[Any]:
        """Give everything as prometheus_client's families."""
        yield from self._counter_families()
        yield from self._gauge_families()
        yield from self._histogram_families()

    def _counter_families(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily

        requests = CounterMetricFamily("medshard_requests", "Requests answered.", labels=["method", "route", "status"])
        for (method, route, status), count in self._requests.items():
            requests.add_metric([method, route, str(status)], count)
        refused = CounterMetricFamily("medshard_refused", "Requests not granted, by kind of error.", labels=["reason"])
        for reason, count in self._refused.items():
            refused.add_metric([reason], count)
        moved = CounterMetricFamily("medshard_body_bytes", "Bytes of request (in) and answer (out) bodies.", labels=["direction"])
        for direction, count in self._bytes.items():
            moved.add_metric([direction], count)
        denied = CounterMetricFamily("medshard_reads_refused", "Reads of shards refused, by the reason.", labels=["reason"])
        for reason in Reason:
            denied.add_metric([reason.value], self._denied[reason.value])
        yield from (requests, refused, moved, denied)
        yield from self._repair_families()
        yield from self._audit_families()
        yield CounterMetricFamily("medshard_emergency_reads", "Reads served in an emergency.", value=self._emergencies)
        yield CounterMetricFamily("medshard_swept_shards", "Shards deleted since they were never registered.", value=self._swept)

    def _repair_families(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily

        refused = CounterMetricFamily("medshard_repair_refused", "Requests for help in a repair refused, by the reason.", labels=["reason"])
        for reason in RepairReason:
            refused.add_metric([reason.value], self._repairs_refused[reason.value])
        repairs = CounterMetricFamily("medshard_repairs", "Repairs that this node ordered.", labels=["outcome"])
        for outcome in repair_outcomes:
            repairs.add_metric([outcome], self._repairs[outcome])
        exchanged = CounterMetricFamily("medshard_repair_helpers_exchanged", "Helpers left out of a repair.", labels=["cause"])
        for cause in exchange_causes:
            exchanged.add_metric([cause], self._exchanged[cause])
        yield from (refused, repairs, exchanged)
        yield CounterMetricFamily("medshard_repair_sum_bytes", "Bytes of sums given to repairs.", value=self._sums)
        yield CounterMetricFamily("medshard_repair_bytes", "Bytes of shards that this node took over.", value=self._repaired_bytes)

    def _audit_families(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        audits = CounterMetricFamily("medshard_audits", "Shards of other nodes that this node audited.", labels=["verdict"])
        bad = GaugeMetricFamily("medshard_audit_findings", "Shards that were bad when they were last looked at.", labels=["verdict"])
        for verdict in Verdict:
            audits.add_metric([verdict.value], self._audits[verdict.value])
            if verdict.is_bad:
                bad.add_metric([verdict.value], self._bad_shards.get(verdict.value, 0))
        answers = CounterMetricFamily("medshard_audit_answers", "Challenges answered, by what this node said.", labels=["claim"])
        for claim in Claim:
            answers.add_metric([claim.name.lower()], self._audits_answered[claim.name.lower()])
        scrubbed = CounterMetricFamily("medshard_scrubbed", "What this node read again of its own.", labels=["what"])
        for what, count in self._scrubbed.items():
            scrubbed.add_metric([what], count)
        yield from (audits, bad, answers, scrubbed)
        yield CounterMetricFamily("medshard_audit_tags", "Tags of cells given to auditors.", value=self._tags)

    def _gauge_families(self) -> Iterable[Any]:
        from prometheus_client.core import GaugeMetricFamily

        for name, value in self._gauges.items():
            yield GaugeMetricFamily(name, _help[name], value=float(value))
        entries = GaugeMetricFamily("medshard_ledger_entries", "Entries of the ledger in this node's mirror.", labels=["type"])
        for kind, count in self._entries.items():
            entries.add_metric([kind], count)
        evidence = GaugeMetricFamily("medshard_evidence", "Files of evidence of misbehaviour kept by this node.", labels=["kind"])
        findings = GaugeMetricFamily("medshard_watch_findings", "Mirrors that misbehaved in the watch's last round.", labels=["kind"])
        for kind in kinds:
            evidence.add_metric([kind], self._evidence.get(kind, 0))
            findings.add_metric([kind], self._findings.get(kind, 0))
        expiries = GaugeMetricFamily(
            "medshard_certificate_expires_timestamp_seconds", "When a certificate in use ends.", labels=["certificate"]
        )
        for certificate, expires in self._expiries.items():
            expiries.add_metric([certificate], expires)
        yield from (entries, evidence, findings, expiries)
        yield GaugeMetricFamily("medshard_start_timestamp_seconds", "When this process started.", value=self.started)
        build = GaugeMetricFamily("medshard_build_info", "Always 1.", labels=["version"])
        build.add_metric([version("medshard")], 1)
        yield build

    def _histogram_families(self) -> Iterable[Any]:
        from prometheus_client.core import HistogramMetricFamily

        took = HistogramMetricFamily("medshard_request_seconds", "From a request's head to its answer.", labels=["method", "route"])
        for (method, route), histogram in self._took.items():
            took.add_metric([method, route], buckets=histogram.cumulative(), sum_value=histogram.total)
        yield took
        with self._fsync_lock:
            buckets, total = self._fsync.cumulative(), self._fsync.total
        fsync = HistogramMetricFamily("medshard_fsync_seconds", "How long the disk took to make a shard durable.")
        fsync.add_metric([], buckets=buckets, sum_value=total)
        yield fsync


_help: Final = {
    "medshard_shards": "Shards stored.",
    "medshard_manifests": "Manifests stored.",
    "medshard_stored_bytes": "Bytes of shards and manifests stored.",
    "medshard_free_bytes": "Bytes that may still be stored: the lesser of quota left and disk left.",
    "medshard_capacity_bytes": "Bytes that this node may store at most.",
    "medshard_repair_queue": "Files that this node knows, or suspects, to be short of shards.",
    "medshard_repair_lowest_margin": "How many more shards the worst of them may lose; below 0 it cannot be read. Absent when all is well.",
    "medshard_repair_stuck_files": "Files with a lost shard that no node may take over.",
    "medshard_drain_left_shards": "Shards that this node has still to hand over before it may leave.",
    "medshard_roster_number": "Which roster this node goes by; 0 is the genesis file.",
    "medshard_emergency_reads_waiting": "Emergency reads that are served and not yet in the ledger.",
    "medshard_audit_silent_nodes": "Nodes that have answered no audit for longer than the grace.",
    "medshard_ledger_size": "Entries in this node's mirror of the ledger.",
    "medshard_ledger_published_size": "Entries under the newest checkpoint that a quorum cosigned, as far as this node knows.",
    "medshard_ledger_is_sequencer": "1 on the node that orders entries.",
    "medshard_ledger_epoch": "Counts the takeovers of the sequencer that this node knows of.",
    "medshard_ledger_lost": "1 on a node that lost part of its ledger and cosigns nothing until its key is replaced.",
    "medshard_ledger_left_out_entries": "Entries handed in here that the sequencer has left out for ten seconds.",
}


class _Collector:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Any]:
        return self._metrics.families()


@asynccontextmanager
async def serve_metrics(config: Config, metrics: Metrics, refresh: Callable[[], None]) -> AsyncIterator[None]:
    """Answer /metrics and /healthz over plain HTTP where the configuration says, if it says so. ``refresh`` sets the gauges.

    Raises Unavailable if metrics are asked for and prometheus_client is not installed: an operator who waits for alerts must know.
    """
    if config.metrics_address is None:
        yield
        return
    metrics.capacity(config.capacity_bytes)
    metrics.render()

    async def answer(request: web.Request) -> web.Response:
        refresh()
        return web.Response(body=metrics.render(), headers={"Content-Type": content_type})

    async def healthy(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application(client_max_size=1024)
    app.router.add_get("/metrics", answer)
    app.router.add_get("/healthz", healthy)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, *config.metrics_address, reuse_address=True).start()
        yield
    finally:
        await runner.cleanup()
