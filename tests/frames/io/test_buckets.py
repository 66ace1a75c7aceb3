"""Frames in buckets, from a server of the tests that needs no credentials and misbehaves on purpose."""

from __future__ import annotations

import gzip
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from helpers import web_server as web
from helpers.web_server import WebServer
from pydantic import ValidationError

from stampworker.config import FrameSettings
from stampworker.errors import ConfigError, FrameCorrupt, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames import FrameStore

ALL = (slice(None), slice(None))
KEY = "/bucket/night/a.fits"
Open = Callable[..., FrameStore]


SETTINGS = {"s3": "frames.s3_endpoint", "gs": "frames.gs_endpoint", "abfs": "frames.abfs_account"}
CREDENTIALS = {"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS", "abfs": "AZURE_STORAGE_ACCOUNT_KEY"}


ENVIRON: dict[str, tuple[str, dict[str, str], str]] = {
    "s3": (
        "AWS_ENDPOINT_URL",
        {"AWS_ACCESS_KEY_ID": "jane", "AWS_SECRET_ACCESS_KEY": "hunter2"},
        "AWS4-HMAC-SHA256 Credential=jane/",
    ),
    "gs": ("GOOGLE_BASE_URL", {"GOOGLE_BEARER_TOKEN": "hunter2"}, "Bearer hunter2"),
    "abfs": (
        "AZURE_STORAGE_ENDPOINT",
        {"AZURE_STORAGE_ACCOUNT_NAME": "survey", "AZURE_STORAGE_ACCOUNT_KEY": "aHVudGVyMg=="},
        "SharedKey survey:",
    ),
}
"""The vendor's variables for endpoint and credentials, and what the server gets of the latter."""


@pytest.fixture(params=["s3", "gs", "abfs"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Choose a vendor, about whom the environment says nothing."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    chosen: str = request.param
    return chosen


@pytest.fixture
def server(write: Callable[..., Path], pixels: np.ndarray) -> Iterator[WebServer]:
    """Serve ``<scheme>://bucket/night/a.fits`` and a file beside the root."""
    with WebServer() as running:
        content = write("a.fits", pixels).read_bytes()
        running.decodes = True
        running.files |= {KEY: content, f"{KEY}.gz": gzip.compress(content), "/bucket/secret.fits": content}
        yield running


@pytest.fixture
def open_store(server: WebServer, scheme: str) -> Iterator[Open]:
    """Return a function that opens a store with ``<scheme>://bucket/night/`` as its root and short times."""
    stores: list[FrameStore] = []

    def open_store(**settings: Any) -> FrameStore:
        given: dict[str, Any] = {"connect_s": 0.5, "read_s": 0.4, "total_s": 0.6, "failure_ttl_s": 0.0}
        given |= {f"{scheme}_anonymous": True, f"{scheme}_endpoint": server.url.rstrip("/")}
        given |= {"frame_roots": (f"{scheme}://bucket/night/",)}
        given |= {"abfs_account": "survey"} if scheme == "abfs" else {}
        stores.append(FrameStore(FrameSettings(**given | settings)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.mark.parametrize("name", ["a.fits", "a.fits.gz"])
def test_same_pixels(server: WebServer, open_store: Open, pixels: np.ndarray, scheme: str, name: str) -> None:
    """By URL and by a path beneath the first root: the pixels of the file; one request opens it."""
    store = open_store()
    frame = store.open(f"{scheme}://bucket/night/{name}#0")
    np.testing.assert_array_equal(frame[ALL], pixels)
    np.testing.assert_array_equal(store.open(name)[5:9, 70:90], pixels[5:9, 70:90])
    assert frame.url == f"{scheme}://bucket/night/{name}#0"
    assert server.requests[0] == (f"/bucket/night/{name}", "bytes=0-65535")
    assert len(server.requests) == 1


@pytest.mark.parametrize("scheme", ENVIRON, indirect=True)
def test_endpoint_of_the_environment(
    server: WebServer,
    open_store: Open,
    pixels: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    """Endpoint and credentials come from the environment; one that is no address stops the start, as a setting too."""
    name, credentials, authorization = ENVIRON[scheme]
    monkeypatch.setenv(name, server.url.rstrip("/"))
    for other, value in credentials.items():
        monkeypatch.setenv(other, value)
    settings = {f"{scheme}_endpoint": None, f"{scheme}_anonymous": False, "abfs_account": None}
    np.testing.assert_array_equal(open_store(**settings).open("a.fits")[ALL], pixels)
    assert server.headers[0]["Authorization"].startswith(authorization)
    monkeypatch.setenv(name, "hunter2")
    with pytest.raises(ConfigError, match=f"{name}: not an address, wanted"):
        open_store(**settings)
    with pytest.raises(ValidationError, match=f"{scheme}_endpoint"):
        open_store(**{f"{scheme}_endpoint": "nowhere"})


@pytest.mark.parametrize(
    ("scheme", "environ", "problem"),
    [
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "/nonexistent.json"}, "Unable to open service account file"),
        ("gs", {"GOOGLE_SERVICE_ACCOUNT_KEY": "hunter2"}, "Unable to decode service account"),
        ("abfs", {}, "Account must be specified"),
        (
            "abfs",
            {"AZURE_STORAGE_ACCOUNT_NAME": "survey", "AZURE_STORAGE_ACCOUNT_KEY": "hunter2!"},
            "Invalid Access Key",
        ),
        ("abfs", {"AZURE_STORAGE_ACCOUNT_NAME": "survey", "AZURE_STORAGE_SAS_TOKEN": "hunter2"}, "SAS query pair"),
    ],
    indirect=["scheme"],
)
def test_credentials_that_cannot_be(
    open_store: Open, monkeypatch: pytest.MonkeyPatch, scheme: str, environ: dict[str, str], problem: str
) -> None:
    """An account that is missing and credentials that cannot be read stop the start; the message shows none."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"{scheme}://bucket/night/: .*{problem}.*{SETTINGS[scheme]}") as caught:
        open_store(**{f"{scheme}_anonymous": False, "abfs_account": None})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["abfs"], indirect=True)
def test_signature_is_not_shown(
    server: WebServer, open_store: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Azure's shared signature goes to the server in the query, and into no message or log."""
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2021-12-02&sp=r&sig=hunter2")
    store = open_store(abfs_anonymous=False)
    for behaviour in (web.serve, web.status(403), web.status(500), web.reset, web.garbage):
        server.behaviours = dict.fromkeys([f"{KEY}?sv=2021-12-02&sp=r&sig=hunter2"], behaviour)
        if behaviour is web.serve:
            assert store.open("a.fits").url == "abfs://bucket/night/a.fits"
        else:
            with pytest.raises(FrameUnavailable, match="abfs://bucket/night/a") as caught:
                open_store(abfs_anonymous=False).open("a.fits")
            assert "hunter2" not in str(caught.value)
    assert {path for path, _ in server.requests} == {f"{KEY}?sv=2021-12-02&sp=r&sig=hunter2"}
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    "url",
    ["//bucket/secret.fits", "//bucket/night/../secret.fits", "//bucket/night/%2e%2e/secret.fits",
     "//bucket/nights/a.fits", "//other/night/a.fits", "//bucket/night//a.fits", "//bucket", "bucket/night/a.fits",
     "//jane:hunter2@bucket/night/a.fits", "//bucket@survey.dfs.core.windows.net/night/a.fits",
     "//bucket:443/night/a.fits"],
)  # fmt: skip
def test_outside_the_root(server: WebServer, open_store: Open, scheme: str, url: str) -> None:
    """Other buckets and prefixes, parents, empty folders, accounts in the URL are refused, and nothing is asked."""
    refusal = r"outside the frame roots|in the path|empty folder|no bucket|an @ before the path"
    with pytest.raises(FrameRefused, match=refusal) as caught:
        open_store().open(f"{scheme}:{url}")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(FrameRefused, match="in the path"):
        open_store().open("../secret.fits")
    for other in {"s3", "gs", "abfs", "http"} - {scheme}:
        with pytest.raises(FrameRefused, match="outside the frame roots"):
            open_store().open(f"{other}://bucket/night/a.fits")
    assert server.requests == []


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_of_an_endpoint(
    server: WebServer, open_store: Open, pixels: np.ndarray, scheme: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The operator's endpoint may redirect to another host, which does not get the credentials."""
    for name, value in ENVIRON[scheme][1].items():
        monkeypatch.setenv(name, value)
    with WebServer() as other:
        other.files["/a.fits"] = server.files[KEY]
        server.behaviours[KEY] = web.redirect(f"http://localhost:{other.server_port}/a.fits", code)
        frame = open_store(**{f"{scheme}_anonymous": False}).open("a.fits")
        np.testing.assert_array_equal(frame[ALL], pixels)
        assert frame.url == f"{scheme}://bucket/night/a.fits"
        assert "Authorization" in server.headers[0]
        assert "Authorization" not in other.headers[0]
        assert len(other.requests) == 1


def test_missing(server: WebServer, open_store: Open) -> None:
    """A key that is not there is missing; a burst asks once, later it is found."""
    store = open_store(failure_ttl_s=0.2)
    for _ in range(20):
        with pytest.raises(FrameMissing, match=r"://bucket/night/b\.fits: no such bucket or key"):
            store.open("b.fits")
    assert len(server.requests) == 1
    server.files["/bucket/night/b.fits"] = server.files[KEY]
    time.sleep(0.25)
    assert store.open("b.fits").shape == (61, 83)


def test_a_key_is_shown_like_any_url(server: WebServer, open_store: Open, scheme: str) -> None:
    """A question mark is a letter of a key, but of what follows it only names are shown."""
    store = open_store()
    for given in ("a.fits?X-Amz-Signature=hunter2", f"{scheme}://bucket/night/a.fits?X-Amz-Signature=hunter2"):
        assert store.open(given).url == f"{scheme}://bucket/night/a.fits?X-Amz-Signature=***"
    assert store.open("a.fits?7").url == f"{scheme}://bucket/night/a.fits?***"
    assert server.requests[0][0] == f"{KEY}?X-Amz-Signature=hunter2"


@pytest.mark.parametrize("code", [401, 403])
def test_access_denied_is_loud(
    server: WebServer, open_store: Open, scheme: str, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """401 and 403 are unavailable (buckets say so of what is missing), and the log names what to look at."""
    server.behaviours[KEY] = web.status(code)
    with caplog.at_level(logging.ERROR), pytest.raises(FrameUnavailable, match="access denied"):
        open_store().open("a.fits")
    assert CREDENTIALS[scheme] in caplog.text
    assert SETTINGS[scheme] in caplog.text


METADATA = {"s3": "AWS_METADATA_ENDPOINT", "gs": "GCE_METADATA_HOST", "abfs": "AZURE_MSI_ENDPOINT"}


def test_no_credentials_is_loud(
    open_store: Open, scheme: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without credentials, and nobody to give any, the log names what to look at; the bucket is asked for once."""
    with WebServer() as metadata:  # of a cloud machine, as obstore believes
        address = metadata.url.rstrip("/")
        monkeypatch.setenv(METADATA[scheme], address.removeprefix("http://") if scheme == "gs" else address)
        store = open_store(**{f"{scheme}_anonymous": False, "failure_ttl_s": 5.0})
        for name in ("a.fits", "b.fits"):
            with pytest.raises(FrameUnavailable, match=rf"{name}: access denied"):
                store.open(name)
    assert caplog.text.count(CREDENTIALS[scheme]) == 1
    assert SETTINGS[scheme] in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "behaviour",
    [
        web.status(500),
        web.status(503),
        web.status(429),
        web.silence,
        web.drip,
        web.drip_headers,
        web.reset,
        web.garbage,
    ],
)
def test_failing_server(server: WebServer, open_store: Open, behaviour: web.Behaviour) -> None:
    """Failures, silence, drips, resets and nonsense are unavailable in time; the next alerts do not wait."""
    server.behaviours[KEY] = behaviour
    server.files[KEY] += bytes(100_000)
    store = open_store(failure_ttl_s=5.0)
    start = time.monotonic()
    for _ in range(30):
        with pytest.raises(FrameUnavailable, match=r"^\w+://bucket/night/a\.fits: "):
            store.open("a.fits")
    assert time.monotonic() - start < 1.5
    assert len(server.requests) == 1


def test_server_that_is_down(server: WebServer, open_store: Open, scheme: str) -> None:
    """No server at the endpoint: unavailable, for every key."""
    with WebServer() as other:
        url = other.url
    store = open_store(**{f"{scheme}_endpoint": url.rstrip("/"), "failure_ttl_s": 5.0})
    with pytest.raises(FrameUnavailable, match="error sending request"):
        store.open("a.fits")
    with pytest.raises(FrameUnavailable, match=r"b\.fits: .*asked again in"):
        store.open("b.fits")


def test_bad_bodies_and_limits(server: WebServer, open_store: Open) -> None:
    """A page is corrupt, so is an empty object; a gzip file above max_download_bytes is refused."""
    server.files |= {
        "/bucket/night/page": b"<html>",
        "/bucket/night/big.gz": gzip.compress(bytes(100), mtime=0) + bytes(200_000),
    }
    server.files["/bucket/night/empty"] = b""
    store = open_store(max_download_bytes=100_000)
    with pytest.raises(FrameCorrupt, match="HDU 0 begins with '<html>'"):
        store.open("page")
    with pytest.raises(FrameCorrupt, match="the file is empty"):
        store.open("empty")
    with pytest.raises(FrameRefused, match="bytes at once, above the 100000 allowed"):
        store.open("big.gz")


def test_range_that_cannot_be(server: WebServer, open_store: Open, tmp_path: Path) -> None:
    """A server that is mistaken about a range does not make an object empty, nor one that has become shorter."""
    server.files[KEY] += bytes(100_000)
    server.behaviours[KEY] = web.first(web.status(416))
    store = open_store()
    with pytest.raises(FrameUnavailable, match="no byte of the range"):
        store.open("a.fits")
    fits.PrimaryHDU(np.zeros((400, 200), "f4")).writeto(tmp_path / "b.fits")
    server.files[KEY] = (tmp_path / "b.fits").read_bytes()
    frame = store.open("a.fits")
    server.files[KEY] = server.files[KEY][:100_000]
    with pytest.raises(FrameUnavailable, match="no byte of the range") as caught:
        frame[300:320, 5:9]
    assert type(caught.value) is FrameUnavailable  # an error that rejects name and callers can import


@pytest.mark.parametrize("checks", [True, False])
def test_object_that_changes(server: WebServer, open_store: Open, tmp_path: Path, checks: bool) -> None:
    """An object replaced while it is open is unavailable where its bytes would mix, and read at the next open.

    Also where the server ignores If-Match.
    """
    data = np.random.default_rng(5).normal(size=(400, 200)).astype("f4")
    for i in range(2):
        fits.PrimaryHDU(data + i).writeto(tmp_path / f"{i}.fits")
    server.files[KEY] = (tmp_path / "0.fits").read_bytes()
    store = open_store()
    frame = store.open("a.fits")
    server.files[KEY] = (tmp_path / "1.fits").read_bytes()

    def serve(handler: web.Handler) -> None:
        if not checks:
            del handler.headers["If-Match"]
        web.serve(handler, etag='"2"')

    server.behaviours[KEY] = serve
    with pytest.raises(FrameUnavailable, match="another one than when it was opened"):
        frame[300:320, 5:9]
    np.testing.assert_array_equal(store.open("a.fits")[300:320, 5:9], data[300:320, 5:9] + 1)
