"""The node's description of itself is its routes, all of them and no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

from storenode import openapi
from storenode.app import Parts, build
from storenode.auditing.routes import audits_key
from storenode.config import AuditSection, RepairSection
from storenode.guard import open_paths
from storenode.routes import Node

if TYPE_CHECKING:
    from tests.storenode.conftest import Net

formats = Path(__file__).parents[2] / "docs" / "formats"


async def test_the_document_has_each_route_of_the_application_and_no_other(net: Net) -> None:
    ledger = net.open(0)
    parts: Any = MagicMock(spec=Parts)
    config = MagicMock(data=net.folder, audit=AuditSection(), repair=RepairSection())
    parts.node = Node(config, net.roster.nodes[0].id, MagicMock(), ledger)
    app = build(parts, MagicMock())
    routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
    told = {(operation.method, operation.path) for operation in openapi.operations}
    assert sorted(routes - told - {("HEAD", route) for _, route in routes}) == []  # aiohttp answers HEAD for some GETs by itself
    assert sorted(told - routes) == []
    app[audits_key].auditor.findings.close()
    await ledger.close()


def test_the_document_says_who_needs_no_certificate() -> None:
    assert {operation.path for operation in openapi.operations if operation.open} == open_paths
    document = openapi.document()
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert document["paths"]["/v1/status"]["get"]["security"] == [{"certificate": []}]


def test_each_operation_names_a_page_that_is_there() -> None:
    assert {operation.page for operation in openapi.operations} <= {page.stem for page in formats.glob("*.md")}


def test_every_parameter_and_error_is_described() -> None:
    for methods in openapi.document()["paths"].values():
        for told in methods.values():
            assert all(parameter["schema"] for parameter in told["parameters"])
            assert {"400", "403", "404", "503", "507"} <= set(told["responses"])
