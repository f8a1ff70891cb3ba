"""import, receipt and reindex from the command line."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from pydicom.uid import generate_uid
from tests.gateway.conftest import make_instance

from medshard.cli.main import main
from medshard.consortium import LocalConsortium


def test_what_was_imported_has_a_receipt_and_a_damaged_index_is_made_again(
    trial: LocalConsortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSHARD_HOME", str(trial.vault_home))
    uids = [generate_uid() for _ in range(3)]
    files = [make_instance("1.2.3.7", "1.2.3.7.4", uid) for uid in uids]
    for number, file in enumerate(files):
        (tmp_path / f"{number}.dcm").write_bytes(file)
    (tmp_path / "notes.txt").write_text("no image")
    assert main(["import", str(tmp_path)]) == 8
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"{sha256(file).hexdigest()}  {tmp_path}/{number}.dcm" for number, file in enumerate(files)]
    assert "notes.txt: refused: no DICOM file" in told.err

    assert main(["receipt", uids[1]]) == 0
    assert capsys.readouterr().out.startswith(sha256(files[1]).hexdigest())
    assert main(["receipt", "1.2.3.99"]) == 3
    capsys.readouterr()

    (trial.vault_home / "dicom.sqlite").write_bytes(b"not a database, but long enough to look like something" * 100)
    assert main(["receipt", uids[1]]) == 6
    assert "medshard reindex" in capsys.readouterr().err
    assert main(["reindex", "--json"]) == 0
    capsys.readouterr()
    assert main(["--json", "receipt", uids[1]]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert (receipt["sop_uid"], receipt["sha256"], receipt["flagged"]) == (uids[1], sha256(files[1]).hexdigest(), False)
