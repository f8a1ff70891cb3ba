"""An export as a page to read: one HTML file that needs nothing beside it and runs nothing.

Law: every text in it comes from outside and is escaped. What it says stands in the manifest, too.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from medshard.grants import Happened, Shared
from medshard.patients.gathering import Gathered
from medshard.reports.model import moment
from medshard.text import shown

_style: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 70rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; color: #1f5f8b; }
p.lead { color: #53616e; margin-top: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; } dt { color: #53616e; } dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; } th { text-align: left; background: #1f5f8b; color: #fff; }
th, td { padding: .35rem .6rem; vertical-align: top; overflow-wrap: anywhere; } tr:nth-child(odd) td { background: #f1f5f8; }
code { font-size: .82rem; } td code { font-size: .7rem; } td.short { white-space: nowrap; } .alert td { background: #fdeceb !important; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""
_attributes: Final = ("modality", "study-date", "study-description", "policy-number", "policy-product", "title")


def page(told: Mapping[str, Any], gathered: Gathered) -> str:
    """The page."""
    others = sum(each.what.startswith("read") and each.author_name != "this vault" for each in gathered.happened)
    facts = (
        ("Patient", gathered.patient),
        ("Made", f"{told['made']} UTC"),
        ("Documents", f"{len(gathered.rows)}, {sum(row.size for row in gathered.rows):,} bytes"),
        ("Entries of the ledger about them", str(len(gathered.happened))),
        ("Reads by others", str(others)),
        (
            "Who may read them now",
            str(len({each.peer for each in gathered.grants if _stands(each, gathered.made)}) or "nobody but the vault"),
        ),
        ("Held by vault", f"{told['vault']} in the ledger {told['log']}"),
    )
    parts = [
        f"<h1>All that concerns {_text(gathered.patient)}</h1>",
        '<p class="lead">Documents, what happened to them, and who may read them, as the ledger of a consortium records it.</p>',
        "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts) + "</dl>",
        "<h2>Documents</h2>",
        _documents(told["documents"]),
        "<h2>Who may read them</h2>",
        _table(
            ("document", "reader", "institution", "purpose", "until", "state"),
            (_grant(each, gathered.made) for each in sorted(gathered.grants, key=lambda each: each.grant_index)),
        ),
    ]
    for heading, columns, rows in _more(told):
        if rows:
            parts += [f"<h2>{heading}</h2>", _table(columns, rows)]
    parts += [
        "<h2>What happened</h2>",
        _table(
            ("time (UTC)", "what", "who", "institution", "purpose", "entry"),
            (_line(each) for each in gathered.happened),
            {number for number, each in enumerate(gathered.happened) if "emergency" in each.what or "without a right" in each.what},
        ),
        "<h2>To check it</h2>",
        "<p><code>sha256sum -c SHA256SUMS</code> compares the documents with their hashes. <code>medshard check-proof proofs/… documents/… "
        "--genesis genesis.medshard</code> checks offline that one was registered, by whom and when; take the SHA-256 of the genesis file "
        f"(<code>{_text(told['genesis_sha256'])}</code>) from somebody else than whoever gave you this. manifest.json holds all of it for "
        "programs.</p>",
        "<p>An entry of an object that holds several documents, such as a series, is listed once. Times are those of the ledger's "
        "cosigners. What was read by somebody before is out of reach of everything here.</p>",
    ]
    head = f'<meta charset="utf-8"><title>All that concerns {_text(gathered.patient)}</title><style>{_style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _documents(documents: Sequence[Mapping[str, Any]]) -> str:
    columns = ("document", "about", "size", "stored", "kept until", "SHA-256")
    lines = []
    for each in documents:
        about = ", ".join(str(each["attributes"][name]) for name in _attributes if name in each["attributes"])
        kept = each["retained_until"][:10] + (", on hold" if each["holds"] else "")
        name = f'<a href="{_text(each["path"])}">{_text(each["name"])}</a>'
        short = "".join(f'<td class="short">{cell}</td>' for cell in (f"{each['size']:,}", each["stored"], kept))
        lines.append(f"<tr><td>{name}</td><td>{_text(about)}</td>{short}<td><code>{each['sha256']}</code></td></tr>")
    head = "".join(f"<th>{column}</th>" for column in columns)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _more(told: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    return [
        (
            "Links",
            ("link", "made", "until", "state", "uses"),
            [(each["link"], each["made"], each["until"] or "no end", each["state"], str(each["uses"])) for each in told["links"]],
        ),
        (
            "Requests",
            ("by", "message", "answer", "files"),
            [(each["asker"], each["wish"]["message"], each["answer"] or "none yet", str(each["files"])) for each in told["requests"]],
        ),
        ("De-identified copies", ("record", "SHA-256"), [(each["name"], each["record"]) for each in told["deidentified_copies"]]),
        (
            "Documents of others that this vault may read",
            ("document", "owner", "SHA-256"),
            [(each["name"], each["owner"], each["sha256"]) for each in told["shared_with_this_vault"]],
        ),
    ]


def _grant(each: Shared, now: int) -> tuple[str, ...]:
    state = "in force" if _stands(each, now) else f"ended by entry {each.ended}" if each.ended else "run out"
    who = each.peer_name or f"{each.peer.hex()[:16]}…"
    return (shown(each.name), who, each.institution, each.purpose, moment(each.until) or "no end", state)


def _stands(each: Shared, now: int) -> bool:
    return not each.ended and not 0 < each.until < now


def _line(each: Happened) -> tuple[str, ...]:
    what = each.what + (f" to {each.reader_name or each.reader.hex()[:16] + '…'}" if each.reader else "")
    who = each.author_name or f"{each.author.hex()[:16]}…"
    return (("" if each.exact else "before ") + moment(each.time), what, who, each.institution, each.purpose, str(each.index))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], marked: Iterable[int] = ()) -> str:
    alert = set(marked)
    lines = [
        f"<tr{' class=alert' if number in alert else ''}>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(rows)
    ]
    if not lines:
        return "<p>None.</p>"
    return f"<table><tr>{''.join(f'<th>{_text(column)}</th>' for column in columns)}</tr>{''.join(lines)}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
