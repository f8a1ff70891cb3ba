"""The node's HTTP interface against requests that schemathesis makes up out of the node's own description of it, over real TLS.

Law: whatever is asked, by a client, by another node of the consortium or by nobody, the answer is below 500, or 503 or 507 with an error of
our form; the node's log has no error of its own, and afterwards it serves as before. Half of the bodies are damaged messages of ours.
"""

from __future__ import annotations

import json
import ssl
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install 'medshard[fuzz]'")

import requests  # noqa: E402 - comes with schemathesis
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import seed as seeded  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from requests.adapters import HTTPAdapter  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from tests.chaos.callers import Door  # noqa: E402
from tests.protocol.test_fuzz_parsers import mutate, table  # noqa: E402

from medshard.consortium import LocalConsortium  # noqa: E402
from medshard_protocol import canonical  # noqa: E402
from medshard_protocol.identity import node_hostname  # noqa: E402
from medshard_protocol.messages import body_type, error_bytes_max  # noqa: E402
from storenode import openapi  # noqa: E402

answers_in_s = 20.0
examples_in_a_slice, examples_in_the_soak = 4, 400


class Adapter(HTTPAdapter):
    """Connects to an address, shows a certificate, and checks the node's name instead of the address."""

    def __init__(self, context: ssl.SSLContext, name: str) -> None:
        self._how = {"ssl_context": context, "server_hostname": name, "assert_hostname": name}
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **more: Any) -> None:
        super().init_poolmanager(*arguments, **more, **self._how)

    def build_connection_pool_key_attributes(self, *arguments: Any, **more: Any) -> Any:
        host, pool = super().build_connection_pool_key_attributes(*arguments, **more)
        return host, {key: value for key, value in pool.items() if key not in ("ca_certs", "ca_cert_dir", "cert_reqs")} | self._how


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with LocalConsortium(tmp_path_factory.mktemp("http"), institutions=4, code=(2, 4)) as trial:
        yield Door(trial, trial.names[1])


def session(door: Door, context: ssl.SSLContext) -> requests.Session:
    made = requests.Session()
    made.trust_env = False
    made.mount("https://", Adapter(context, node_hostname(door.node.id)))
    return made


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Messages of ours, whole or damaged, and bytes from nowhere."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=200))
    parsers = table()
    data = draw(st.sampled_from(parsers[draw(st.sampled_from(sorted(parsers)))].seeds))
    return mutate(draw(st.randoms(use_true_random=False)), data) if draw(st.booleans()) else data


for media_type in (body_type, "application/octet-stream", "text/plain"):
    schemathesis.openapi.media_type(media_type, bodies())

    @schemathesis.serializer(media_type)
    def serialize(_context: Any, value: Any) -> Any:
        return value if isinstance(value, bytes) else json.dumps(value, default=str).encode()


def check(answer: Any) -> None:
    if answer.status_code < 500:
        return
    assert answer.status_code in (503, 507)
    assert answer.headers["content-type"] == [body_type]
    version, code, _, _ = canonical.decode(answer.content, bytes_max=error_bytes_max, what="error")
    assert (version, code) == (1, {503: "unavailable", 507: "full"}[answer.status_code])


def fuzz(door: Door, examples: int) -> Counter[int]:
    """Ask each operation so often as each kind of caller; how often which status came."""
    since, told = door.log.stat().st_size, Counter[int]()
    other = next(name for name in door.trial.names if name != door.name)
    callers = [session(door, context) for context in (door.as_vault(), door.as_node(other), door.as_nobody())]
    document = callers[0].get(door.node.url + openapi.path).json()
    assert document == openapi.document()
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()
        modes = [operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]

        @seeded(1)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.one_of(modes), st.sampled_from(callers))
        def ask(case: Any, caller: requests.Session) -> None:
            try:
                answer = case.call(base_url=door.node.url, session=caller, timeout=answers_in_s)
            except requests.exceptions.RequestException as error:
                if isinstance(error, requests.exceptions.Timeout):
                    raise
                told[0] += 1  # nothing that HTTP can carry, or a connection that the node closed on us
                return
            told[answer.status_code] += 1
            check(answer)

        ask()
    assert door.complaints(since) == []
    assert door.trial.running[door.name].poll() is None
    assert callers[2].get(door.node.url + "/healthz").text == "ok\n"
    return told


@pytest.mark.filterwarnings("ignore")
def test_no_request_out_of_the_nodes_own_description_is_a_server_error(door: Door) -> None:
    told = fuzz(door, examples_in_a_slice)
    assert told[200] > 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_no_request_out_of_the_nodes_own_description_is_a_server_error_for_longer(door: Door) -> None:
    print(dict(sorted(fuzz(door, examples_in_the_soak).items())))
