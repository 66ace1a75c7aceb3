"""Servers of frames as processes on 127.0.0.1: nginx; for buckets the Versity S3 Gateway, fake-gcs-server, Azurite."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

_CACHE = Path(__file__).parents[2] / ".cache/servers"
_INSTALL = "Run: tests/servers/frame_servers.sh (or: make test); without it: make test-unit"
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
        port, self.tls_port = free_port(), free_port()
        self.certificate, self._access = folder / "cert.pem", folder / "access.log"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", self.certificate],
            check=True,
            capture_output=True,
        )  # fmt: skip
        user = "user root;" if os.geteuid() == 0 else ""  # else its workers may not enter this folder
        config = _NGINX.format(folder=folder, root=root, user=user, port=port, tls_port=self.tls_port)
        (folder / "nginx.conf").write_text(config)
        self.url, self.tls_url = f"http://127.0.0.1:{port}/", f"https://localhost:{self.tls_port}/"
        command = [nginx, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
        super().__init__(command, port, folder / "out.log")

    def moved(self) -> list[tuple[int, int]]:
        """Return status and bytes, headers included, of each answer up to now."""
        before = None
        while before != (lines := self._access.read_text().splitlines()):  # written after the last byte is sent
            before = lines
            time.sleep(0.1)
        return [(int(status), int(size)) for status, size, _ in map(str.split, lines)]


def _find(program: str, name: str, runtime: str, folder: str = "") -> str:
    """Return the path of a server that `frame_servers.sh` brings where its runtime is; skip where it is not."""
    found = shutil.which(program) or shutil.which(_CACHE / folder / program)
    if found is None:
        why = f", and {runtime} is not here to get it with" if shutil.which(runtime) is None else f". {_INSTALL}"
        pytest.skip(f"{name} is not installed{why}")
    return found


class Bucket(Process):
    """A server with a bucket named ``bucket``; ``root``, ``settings`` and ``environ`` are for a store on it."""

    root: str
    settings: dict[str, Any]
    environ: dict[str, str]

    def fill(self, folder: Path) -> None:
        """Bring the files of the folder ``bucket`` that are not there yet into the bucket."""
        self._there: set[Path] = getattr(self, "_there", set())
        for path in sorted(set(folder.iterdir()) - self._there):
            self._upload(path.name, path.read_bytes())
            self._there.add(path)

    def _upload(self, name: str, data: bytes) -> None:
        raise NotImplementedError


class Gateway(Bucket):
    """The Versity S3 Gateway, which serves a folder of buckets as it is."""

    def __init__(self, root: Path, folder: Path) -> None:
        found = _find("versitygw", "the Versity S3 Gateway", "go")
        port = free_port()
        self.root, self.settings = "s3://bucket/", {"s3_endpoint": f"http://127.0.0.1:{port}"}
        self.environ = {"AWS_ACCESS_KEY_ID": "jane", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2"}
        secrets = {"ROOT_ACCESS_KEY": "jane", "ROOT_SECRET_KEY": "hunter2hunter2"}
        super().__init__([found, "--port", f"127.0.0.1:{port}", "posix", str(root)], port, folder / "out.log", secrets)

    def _upload(self, name: str, data: bytes) -> None:
        """Do nothing: the folder is the bucket."""


class FakeGoogle(Bucket):
    """fake-gcs-server, in memory."""

    def __init__(self, root: Path, folder: Path) -> None:
        found = _find("fake-gcs-server", "fake-gcs-server", "go")
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self.root, self.settings = "gs://bucket/", {"gs_endpoint": self._url, "gs_anonymous": True}
        self.environ = {}
        command = [found, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        super().__init__([*command, "-public-host", "127.0.0.1"], port, folder / "out.log")
        self._post("/storage/v1/b?project=test", json.dumps({"name": "bucket"}).encode(), "application/json")

    def _upload(self, name: str, data: bytes) -> None:
        path = f"/upload/storage/v1/b/bucket/o?uploadType=media&name={quote(name, safe='')}"
        self._post(path, data, "image/fits")

    def _post(self, path: str, body: bytes, kind: str) -> None:
        urlopen(Request(self._url + path, body, {"Content-Type": kind}), timeout=20).close()


class Azurite(Bucket):
    """Azurite's blob service, in memory."""

    # Known to everyone: the emulator's account.
    _ACCOUNT = "devstoreaccount1"
    _KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self, root: Path, folder: Path) -> None:
        found = _find("azurite-blob", "Azurite", "npm", "node_modules/.bin")
        port = free_port()
        self._url = f"http://127.0.0.1:{port}/{self._ACCOUNT}"
        self.root, self.settings = "abfs://bucket/", {"abfs_account": self._ACCOUNT, "abfs_endpoint": self._url}
        self.environ = {"AZURE_STORAGE_ACCOUNT_KEY": self._KEY}
        command = [found, "--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
        super().__init__([*command, "--blobHost", "127.0.0.1", "--blobPort", str(port)], port, folder / "out.log")
        self._put("/bucket")

    def _upload(self, name: str, data: bytes) -> None:
        self._put(f"/bucket/{quote(name)}", data)

    def _put(self, path: str, body: bytes | None = None) -> None:
        """Make a container, or a blob where there is a body, by a request signed as Azure's "shared key" is."""
        headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
        headers |= {"x-ms-blob-type": "BlockBlob"} if body is not None else {}
        named = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        length, query = len(body or b"") or "", "" if body is not None else "\nrestype:container"
        signed = f"PUT\n\n\n{length}\n\nimage/fits\n\n\n\n\n\n\n{named}/{self._ACCOUNT}/{self._ACCOUNT}{path}{query}"
        digest = hmac.digest(base64.b64decode(self._KEY), signed.encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {self._ACCOUNT}:{base64.b64encode(digest).decode()}"
        headers |= {"Content-Type": "image/fits"}
        url = self._url + path + ("" if body is not None else "?restype=container")
        urlopen(Request(url, body or b"", headers, method="PUT"), timeout=20).close()


class Relay:
    """A port that passes connections on to another one and counts the bytes that come back."""

    def __init__(self, port: int) -> None:
        self.moved = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._other: dict[socket.socket, socket.socket] = {}
        self._servers: set[socket.socket] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _connect(self, client: socket.socket) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._target))

    def _run(self) -> None:
        while not self._over.is_set():
            for source in select.select([self._listener, *self._other], [], [], 0.02)[0]:
                if source is self._listener:
                    client = source.accept()[0]
                    server = self._connect(client)
                    self._servers.add(server)
                    self._other |= {client: server, server: client}
                elif source in self._other:
                    self._pass(source, self._other[source])

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        data = source.recv(1 << 16)
        if source in self._servers:
            self.moved += len(data)
        sink.sendall(data)
        if not data:
            for end in (source, sink):
                del self._other[end]
                end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        for end in (self._listener, *self._other):
            end.close()


class Proxy(Relay):
    """A proxy that connects to whatever port of this machine it is asked for; ``heads`` are the requests for that."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        super().__init__(0)

    def _connect(self, client: socket.socket) -> socket.socket:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1 << 12)
        self.heads.append(head.decode())
        server = socket.create_connection(("127.0.0.1", int(head.split()[1].rpartition(b":")[2])))
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        return server
