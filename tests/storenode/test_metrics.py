"""Counting, and what Prometheus gets."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import aiohttp
import pytest

from medshard_protocol.audit import Verdict
from medshard_protocol.errors import Unavailable
from storenode.config import Config
from storenode.consortium import free_ports
from storenode.metrics import Metrics, serve_metrics


def test_what_was_counted_is_rendered() -> None:
    metrics = Metrics()
    metrics.request("PUT", "/v1/shards/{file}/{index}", 201, 0.003, 1000, 50)
    metrics.request("PUT", "/v1/shards/{file}/{index}", 201, 0.3, 1000, 50)
    metrics.refused("Conflict")
    metrics.fsync(0.004)
    metrics.swept(3)
    metrics.stored(7, 5, 12345, 99999)
    metrics.certificate("node", 2e9)
    metrics.ledger({"size": 42, "published": 41, "role": "mirror", "entries": {"REGISTER": 40}})
    metrics.audited(Verdict.ABSENT)
    metrics.audit_answered("held", tagged=True)
    metrics.scrubbed(3, 3000, 1)
    metrics.findings({Verdict.WRONG: 2}, 1)
    text = metrics.render().decode()
    for line in (
        'medshard_audits_total{verdict="absent"} 1.0',
        'medshard_audit_findings{verdict="wrong"} 2.0',
        "medshard_audit_silent_nodes 1.0",
        'medshard_audit_answers_total{claim="held"} 1.0',
        "medshard_audit_tags_total 1.0",
        'medshard_scrubbed_total{what="bad"} 1.0',
        'medshard_requests_total{method="PUT",route="/v1/shards/{file}/{index}",status="201"} 2.0',
        'medshard_request_seconds_bucket{le="0.005",method="PUT",route="/v1/shards/{file}/{index}"} 1.0',
        'medshard_request_seconds_count{method="PUT",route="/v1/shards/{file}/{index}"} 2.0',
        'medshard_refused_total{reason="Conflict"} 1.0',
        'medshard_body_bytes_total{direction="in"} 2000.0',
        'medshard_body_bytes_total{direction="out"} 100.0',
        'medshard_fsync_seconds_bucket{le="0.005"} 1.0',
        "medshard_swept_shards_total 3.0",
        "medshard_shards 7.0",
        "medshard_free_bytes 99999.0",
        "medshard_ledger_size 42.0",
        "medshard_ledger_published_size 41.0",
        'medshard_ledger_entries{type="REGISTER"} 40.0',
        'medshard_certificate_expires_timestamp_seconds{certificate="node"} 2e+09',
    ):
        assert line in text, line


def test_a_client_cannot_make_the_table_grow() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.request(f"VERB{number}", "unknown", 405, 0.001, 0)
    assert metrics.render().count(b"medshard_requests_total{") == 1


def test_counting_costs_next_to_nothing() -> None:
    metrics = Metrics()
    started = time.thread_time()
    for _ in range(10_000):
        metrics.request("GET", "/v1/status", 200, 0.001, 0, 100)
    assert (time.thread_time() - started) / 10_000 < 20e-6  # 1.5 µs here; the bound leaves room for a slower machine


def test_without_prometheus_client_counting_works_and_rendering_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    metrics = Metrics()
    metrics.request("GET", "/v1/status", 200, 0.001, 0)
    with pytest.raises(Unavailable) as raised:
        metrics.render()
    assert "medshard[node]" in raised.value.hint


async def test_prometheus_is_answered_with_fresh_gauges_and_health(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    config = Config.parse(tmp_path, f'url = "https://node.example:9700"\n[metrics]\nlisten = "127.0.0.1:{port}"\n')
    metrics, asked = Metrics(), []

    def refresh() -> None:
        asked.append(1)
        metrics.stored(len(asked), 0, 0, 0)

    async with serve_metrics(config, metrics, refresh), aiohttp.ClientSession() as session:
        for number in (1, 2):
            async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert f"medshard_shards {number}.0" in await response.text()
        async with session.get(f"http://127.0.0.1:{port}/healthz") as response:
            assert await response.text() == "ok\n"
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(f"http://127.0.0.1:{port}/metrics")


async def test_without_an_address_nothing_listens(tmp_path: Path) -> None:
    config = Config.parse(tmp_path, 'url = "https://node.example:9700"\n')
    async with serve_metrics(config, Metrics(), lambda: pytest.fail("nobody asked")):
        pass
