"""A timestamp authority on loopback, made with `openssl ts`: certificates, and a small HTTP server around it."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

openssl = shutil.which("openssl")

_config = """
[tsa]
default_tsa = tsa_1
[tsa_1]
serial = {folder}/serial
signer_cert = {folder}/tsa.crt
signer_key = {folder}/tsa.key
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
accuracy = secs:1
ess_cert_id_alg = sha256
[ca]
basicConstraints = critical,CA:true
keyUsage = critical,keyCertSign
[signer]
basicConstraints = critical,CA:false
keyUsage = critical,digitalSignature
extendedKeyUsage = critical,{usage}
"""


class Authority:
    """An RFC 3161 authority whose files lie in a folder; ``pem`` is what to trust."""

    def __init__(self, folder: Path, *, usage: str = "timeStamping") -> None:
        self.folder = folder
        self.asked: list[bytes] = []
        self.spoil: Callable[[bytes], bytes] = bytes  # what becomes of an answer on its way
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ts.cnf").write_text(_config.format(folder=folder, usage=usage))
        (folder / "serial").write_text("01\n")
        self._certify("ca", "/CN=Test root", ["-x509", "-extensions", "ca", "-days", "3650"])
        self._certify("tsa", "/CN=Test timestamps", ["-x509", "-CA", "ca.crt", "-CAkey", "ca.key", "-extensions", "signer", "-days", "365"])

    @property
    def pem(self) -> bytes:
        """The authority's certificate and the one above it."""
        return (self.folder / "tsa.crt").read_bytes() + (self.folder / "ca.crt").read_bytes()

    def answer(self, query: bytes) -> bytes:
        """What `openssl ts -reply` says."""
        (self.folder / "query").write_bytes(query)
        self._run("ts", "-reply", "-config", "ts.cnf", "-queryfile", "query", "-out", "answer")
        return (self.folder / "answer").read_bytes()

    def _certify(self, name: str, subject: str, how: list[str]) -> None:
        new = ["-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.crt"]
        self._run("req", "-new", *new, "-subj", subject, "-config", "ts.cnf", *how)

    def _run(self, *words: str) -> None:
        assert openssl is not None
        done = subprocess.run([openssl, *words], cwd=self.folder, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()

    def serve(self) -> tuple[str, Callable[[], None]]:
        """Answer over HTTP: where, and how to stop."""
        authority = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = self.rfile.read(int(self.headers["Content-Length"]))
                authority.asked.append(query)
                body = authority.spoil(authority.answer(query))
                self.send_response(200 if body else 503)
                self.send_header("Content-Type", "application/timestamp-reply")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def stop() -> None:
            server.shutdown()
            server.server_close()

        return f"http://127.0.0.1:{server.server_port}/", stop
