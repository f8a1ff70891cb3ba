"""What a log line can say, and what it cannot."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
from collections.abc import Callable, Iterator

import pytest

from medshard_protocol.invite import Invite
from storenode import logs

Lines = Callable[[], str]


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, Lines]]:
    """A logger set up as a node does it, and what it wrote; the old set-up comes back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    yield logging.getLogger("storenode.test"), stream.getvalue
    root.handlers[:] = handlers
    root.setLevel(level)


def last(written: Lines) -> dict[str, object]:
    line: dict[str, object] = json.loads(written().splitlines()[-1])
    return line


def test_a_request_has_its_fields_and_only_the_start_of_the_key(log: tuple[logging.Logger, Lines]) -> None:
    logger, written = log
    key = os.urandom(32)
    extra = {"method": "PUT", "route": "/v1/shards/{file}/{index}", "status": 201, "ms": 1.25, "peer": key.hex()}
    logger.info("request", extra=extra)
    line = last(written)
    assert line["event"] == "request"
    assert (line["method"], line["route"], line["status"], line["ms"]) == ("PUT", "/v1/shards/{file}/{index}", 201, 1.25)
    assert line["peer"] == key.hex()[:8]
    assert key.hex()[:9] not in written()


def test_a_field_that_is_not_listed_is_not_written(log: tuple[logging.Logger, Lines]) -> None:
    logger, written = log
    logger.info("put", extra={"path": "/home/anna/ct-head.dcm", "secret": b"hunter2", "patient": "Anna"})
    for word in ("anna", "Anna", "hunter2", "ct-head"):
        assert word not in written()


@pytest.mark.parametrize(
    "secret",
    [
        os.urandom(32).hex(),
        os.urandom(16).hex(),
        base64.b64encode(bytes(range(100, 132))).decode(),
        base64.urlsafe_b64encode(os.urandom(32)).decode(),
        Invite("https://n.example:1", bytes(32), os.urandom(16), 0).to_code(),  # type: ignore[arg-type]
    ],
    ids=["a key in hex", "a secret in hex", "base64", "base64 for URLs", "an invitation"],
)
def test_nothing_that_could_be_a_key_or_a_code_is_written(secret: str, log: tuple[logging.Logger, Lines]) -> None:
    logger, written = log
    logger.info("saw %s", secret)
    logger.info("saw", extra={"reason": secret, "url": f"https://x/{secret}", "file": secret})
    try:
        raise ValueError(f"bad value {secret} in request")
    except ValueError:
        logger.exception("failed")
    for start in range(len(secret) - 12):
        assert secret[start : start + 12] not in written()


def test_an_error_says_its_kind_and_place(log: tuple[logging.Logger, Lines]) -> None:
    logger, written = log
    try:
        json.loads("{")
    except ValueError:
        logger.exception("failed")
    error = last(written)["error"]
    assert isinstance(error, dict)
    assert error["kind"] == "JSONDecodeError"
    assert any(place.startswith("test_logs.py:") for place in error["at"])


def test_a_line_stays_one_line_whatever_is_in_it(log: tuple[logging.Logger, Lines]) -> None:
    logger, written = log
    logger.info('forged\n{"level":"error"}', extra={"reason": 'x\n{"a":1}', "method": "GET\r\n\x1b[31m"})
    assert len(written().splitlines()) == 1
    assert "\x1b" not in written()


def test_text_for_eyes_is_one_line_too(log: tuple[logging.Logger, Lines]) -> None:
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    logging.getLogger("storenode").info("ready\nforged\x1b[31m", extra={"listen": "127.0.0.1:9700", "node": "ab" * 16})
    assert stream.getvalue().endswith("ready?forged?[31m  node=abababab  listen=127.0.0.1:9700\n")
    logging.getLogger("storenode").debug("too quiet")
    assert "quiet" not in stream.getvalue()


def test_a_pipe_gets_json_and_times_are_utc(log: tuple[logging.Logger, Lines]) -> None:
    stream = io.StringIO()
    logs.configure("info", "auto", stream)
    logging.getLogger("storenode").info("ready")
    assert json.loads(stream.getvalue())["time"].endswith("+00:00")
