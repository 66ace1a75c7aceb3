"""Credentials reach the server, and no message, log or packet."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from helpers import web_server as web
from helpers.web_server import Open, WebServer

from stampworker import enrich_table
from stampworker.config import FrameSettings
from stampworker.errors import FrameError, FrameMissing, FrameRefused
from stampworker.formats.packets import Packet
from stampworker.frames import FrameStore

ALL = (slice(None), slice(None))


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("?X-Amz-Signature=hunter2", "?X-Amz-Signature=***"),
        ("?sv=1&sig=hunter2", "?sv=***&sig=***"),
        ("?a=1&access_token=hunter2", "?a=***&access_token=***"),
        ("?user=me&pwd=hunter2", "?user=***&pwd=***"),
        ("?a=eyJhbGciOiJIUzI1NiJ9.hunter2", "?a=***"),
        ("?%73ig=hunter2", "?%73ig=***"),
        ("?s%C3%AFg=hunter2=", "?s%C3%AFg=***"),
        ("?a=1;sig=hunter2", "?a=***"),
        ("?hunter2", "?***"),
        ("?a&hunter2&b=", "?***&***&b="),
        (";jsessionid=hunter2", ";***"),
        (";v=1;jsessionid=hunter2?id=hunter2", ";***?id=***"),
    ],
)
def test_credentials_are_used_and_not_shown(
    server: WebServer, open_store: Open, asked: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All of a URL goes to the server; password, values of its query and parameters of its path are not shown."""
    path, url = f"/data/a.fits{asked}", server.url_of() + shown
    server.files[path.partition("?")[0]] = server.files["/data/a.fits"]
    more = "&n=1" if "?" in asked else "?n=1"
    store = open_store()
    given = server.url.replace("http://", "http://jane:hunter2@") + path[1:]
    caplog.set_level(logging.DEBUG)
    assert store.open(given).url == url
    assert server.requests[0][0] == path
    assert server.headers[0]["Authorization"] == "Basic amFuZTpodW50ZXIy"
    for behaviour in (web.status(403), web.status(404), web.status(503), web.reset, web.redirect("/x"), web.garbage):
        server.behaviours[path + more] = behaviour
        with pytest.raises(FrameError, match=rf"^{re.escape(url + more[:-1])}\*\*\*: ") as caught:
            store.open(given + more)
        assert "hunter2" not in str(caught.value)
    assert "hunter2" not in caplog.text
    assert "hunter2" not in repr(store.open(given))


@pytest.mark.parametrize(
    "url",
    [
        "s3://b/p/a?X-Amz-Signature=hunter2",
        "simplecache::https://jane:hunter2@host/x",
        "//jane:hunter2@host/x",
        "file://jane:hunter2@host/x",
        "http://jane:12/hunter2@host/x",
        "http://jane:12/hunt#hunter2@host/x",
        "http://jane:12/hunter2#er@host/x",
        "http://jane:12/hunter2%2f@host/x",
        "http:jane:hunter2@host/x",
        "https:///jane:hunter2@host/x",
        "s3://jane/hunter2@b/p/a",
        "s3:jane:hunter2@b/p/a",
        "ftp://jane:hunter2@host/x",
        "http://jane:hunter2@h:x/",
        "http://h/a%2fb;jsessionid=hunter2",
        "http://h/..;hunter2/a",
        "http://h/a?hunter2#1",
    ],
)
def test_refused_urls_show_no_credentials(open_store: Open, url: str) -> None:
    """Nor where nobody expects any: in odd URLs, in a key, in a URL that a password cuts in two."""
    for store in (open_store(), open_store("s3://b/q/", "/tmp", s3_anonymous=True)):
        with pytest.raises(FrameRefused, match=r"outside|wanted|encoded|not a URL|no host") as caught:
            store.open(url)
        assert "hunter2" not in str(caught.value)
        assert "jane" not in str(caught.value)


def test_a_query_tells_files_apart(server: WebServer, open_store: Open, pixels: np.ndarray) -> None:
    """Frames whose URLs are shown alike are still different frames, and so are their failures."""
    server.behaviours["/data/a.fits?id=8"] = web.without_ranges
    server.behaviours["/data/a.fits?id=9"] = web.status(404)
    store = open_store(failure_ttl_s=5.0)
    with pytest.raises(FrameMissing, match=rf"{re.escape(server.url_of())}\?id=\*\*\*: the server says 404"):
        store.open(server.url_of() + "?id=9")
    seven, eight = (store.open(f"{server.url_of()}?id={i}") for i in (7, 8))
    assert seven is not eight
    assert seven.url == eight.url == server.url_of() + "?id=***"
    np.testing.assert_array_equal(seven[ALL], pixels)
    assert [path.partition("?")[2] for path, _ in server.requests] == ["id=9", "id=7", "id=8"]


def test_netrc(
    server: WebServer,
    open_store: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Credentials for a host come from the netrc file; one that cannot be read is said in the log."""
    store = open_store(remote_ttl_s=0.0)
    store.open("a.fits")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login jane password hunter2\n")
    store.open("a.fits")
    (tmp_path / "netrc").write_text("machine")
    store.open("a.fits")
    sent = [headers.get("Authorization") for headers in server.headers]
    assert sent == [None, "Basic amFuZTpodW50ZXIy", None]
    assert "netrc cannot be used" in caplog.text


def test_table_with_frames_of_a_server(server: WebServer, pixels: np.ndarray) -> None:
    """A call names its frames by URL, signed or not; no root is needed, and the frame next to them stays refused."""
    table = Table({"x": [40.0], "y": [30.0]})
    science = server.url_of() + "?X-Amz-Signature=hunter2#0"
    _, packets = enrich_table(table, frames={"science": science}, radius=4)
    assert isinstance(packets[0], Packet)
    np.testing.assert_array_equal(packets[0].stamps["science"].data, pixels[26:35, 36:45])
    assert packets[0].frames == {"science": server.url_of() + "?X-Amz-Signature=***#0"}
    with FrameStore(FrameSettings(), allowed=[science]) as store, pytest.raises(FrameRefused, match="outside"):
        store.open(server.url_of("secret.fits"))
