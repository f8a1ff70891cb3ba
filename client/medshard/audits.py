"""What the holders' own audits found of a file, as each of them signed it.

Law: a report is its author's word, and shown as that. What is not signed by the node that gave it is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from medshard.model import Audited
from medshard.transport import Net
from medshard_protocol.audit import Report, audit_path
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import NodeId
from medshard_protocol.manifest import Manifest

report_timeout_s: Final = 5.0


async def audits_of(net: Net, manifest: Manifest, holders: Iterable[NodeId]) -> tuple[Audited, ...]:
    """The latest results that these holders tell, by auditor and shard."""
    told = await asyncio.gather(*(_told_by(net, manifest, node) for node in dict.fromkeys(holders)))
    return tuple(each for results in told for each in results)


async def _told_by(net: Net, manifest: Manifest, auditor: NodeId) -> list[Audited]:
    try:
        node = net.holder(auditor)
        report = Report.from_bytes(await net.call(node, "GET", audit_path(manifest.file_id), timeout_s=report_timeout_s))
        report.verify(net.roster.origin, node.tls_key)
        if (report.file_id, report.auditor) != (manifest.file_id, auditor):
            return []
        return [
            Audited(node.name, each.shard, net.holder(each.node).name, each.verdict.value, each.since, each.checked, each.times)
            for each in report.results
            if each.shard < manifest.layout.n
        ]
    except MedshardError:  # one that does not answer, or is older than audits
        return []
