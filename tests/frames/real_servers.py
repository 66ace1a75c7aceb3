"""nginx and the Versity S3 Gateway as processes on 127.0.0.1."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

_CACHE = Path(__file__).parents[2] / ".cache/servers"
_INSTALL = "Run: deploy/servers.sh (or: make test); without it: make test-unit"
_NGINX = """
daemon off;
{user}
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    log_format moved '$status $bytes_sent $request_uri';
    access_log {folder}/access.log moved;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    root {root};
    server {{ listen 127.0.0.1:{port}; location /norange/ {{ alias {root}/; max_ranges 0; }} }}
    server {{
        listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
    }}
}}
"""


def free_port() -> int:
    """Return a port that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


class Process:
    """A server that ends with its ``with``."""

    def __init__(self, command: list[str], port: int, log: Path, environ: dict[str, str] | None = None) -> None:
        self.port = port
        self._command, self._log = command, log
        self._environ = os.environ | (environ or {})
        self.start()

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environ)
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        self.stop()
        pytest.fail(f"{self._command[0]} does not start: {self._log.read_text()[-2000:]}", pytrace=False)

    def stop(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait(20)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and its children."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in [self._process.pid, *map(int, children)]:
            os.kill(pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self.send(signal.SIGCONT)
        self.stop()


class Nginx(Process):
    """A folder over HTTP with ranges, beneath ``norange/`` without, and over TLS with a certificate of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        nginx = shutil.which("nginx", path=os.environ["PATH"] + os.pathsep + "/usr/sbin")
        if nginx is None:
            pytest.fail(f"nginx is not installed. {_INSTALL}", pytrace=False)
        port, tls_port = free_port(), free_port()
        self.certificate, self._access = folder / "cert.pem", folder / "access.log"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", self.certificate],
            check=True,
            capture_output=True,
        )  # fmt: skip
        user = "user root;" if os.geteuid() == 0 else ""  # else its workers may not enter a folder of ours
        config = _NGINX.format(folder=folder, root=root, user=user, port=port, tls_port=tls_port)
        (folder / "nginx.conf").write_text(config)
        self.url, self.tls_url = f"http://127.0.0.1:{port}/", f"https://localhost:{tls_port}/"
        command = [nginx, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
        super().__init__(command, port, folder / "out.log")

    def moved(self) -> list[tuple[int, int]]:
        """Return status and bytes, headers included, of each answer up to now."""
        before = None
        while before != (lines := self._access.read_text().splitlines()):  # written after the last byte is sent
            before = lines
            time.sleep(0.1)
        return [(int(status), int(size)) for status, size, _ in map(str.split, lines)]


class Gateway(Process):
    """A folder of buckets over S3."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.environ = {"AWS_ACCESS_KEY_ID": "jane", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2"}
        found = shutil.which("versitygw") or shutil.which(_CACHE / "versitygw")
        if found is None:
            why = "and Go is not here to build it with" if shutil.which("go") is None else f". {_INSTALL}"
            pytest.skip(f"the Versity S3 Gateway is not installed {why}")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        secrets = {"ROOT_ACCESS_KEY": "jane", "ROOT_SECRET_KEY": "hunter2hunter2"}
        super().__init__([found, "--port", f"127.0.0.1:{port}", "posix", str(root)], port, folder / "out.log", secrets)
