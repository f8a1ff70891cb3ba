"""What stands in deploy/ fits the program: metrics that exist, pins that agree, a founding script that founds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storenode.config import Config
from storenode.genesis import check_membership, load_genesis
from storenode.identity import NodeKeys
from storenode.metrics import Metrics

root = Path(__file__).parents[2]
deploy = root / "deploy"


def exported() -> set[str]:
    metrics = Metrics()
    metrics.request("GET", "/", 200, 0.1, 1, 1)
    metrics.refused("Absent")
    metrics.stored(1, 1, 1, 1)
    metrics.capacity(1)
    metrics.emergencies_waiting(1)
    metrics.tended(1, 1, 1)
    metrics.draining(1)
    metrics.certificate("node", 1)
    metrics.ledger({"entries": {"REGISTER": 1}})
    return {line.split("{")[0].split(" ")[0] for line in metrics.render().decode().splitlines() if not line.startswith("#")}


@pytest.mark.parametrize("path", ["prometheus/alerts.yml", "grafana/dashboards/nodes.json"])
def test_every_metric_asked_for_is_exported(path: str) -> None:
    asked = set(re.findall(r"\b(?:medshard|process)_[a-z0-9_]+", (deploy / path).read_text()))
    assert asked
    assert asked <= exported()


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads((deploy / "grafana/dashboards/nodes.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) > 10
    for panel in dashboard["panels"]:
        assert all(target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"])


def test_the_containers_pins_are_those_of_the_repository() -> None:
    def pins(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9._-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE))

    node, everything = pins(deploy / "requirements.lock"), pins(root / "requirements.lock")
    assert {"aiohttp", "cryptography", "prometheus-client"} <= node.keys()
    assert node.items() <= everything.items()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = (deploy / "systemd/storenode.service").read_text().replace("/opt/medshard/bin/storenode", sys.executable)
    (tmp_path / "storenode.service").write_text(unit)
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "storenode.service"], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "storenode.service" in line] == []


def test_the_founding_script_makes_four_nodes_that_can_start(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "storenode").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m storenode "$@"\n')
    (tools / "id").write_text("#!/bin/sh\necho 1000\n")  # as anybody but root, who would give the files away
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "NODES": str(tmp_path / "nodes")}
    for _ in range(2):
        subprocess.run(["sh", deploy / "compose/founding.sh"], env=environment, check=True, capture_output=True)
    homes = sorted((tmp_path / "nodes").iterdir())
    assert [home.name for home in homes] == ["hospital-01", "hospital-03", "insurer-02", "insurer-04"]
    for home in homes:
        node = check_membership(load_genesis(home), NodeKeys.load(home))
        assert (node.name, node.url) == (home.name, f"https://{home.name}:9700")
        assert Config.load(home).metrics_address == ("0.0.0.0", 9701)
    services = re.findall(r"^  ([a-z]+-0\d):\n    <<: \*node", (deploy / "compose/compose.yaml").read_text(), re.MULTILINE)
    assert sorted(services) == [home.name for home in homes]
