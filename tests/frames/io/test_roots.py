"""Which URLs frames may come from: those beneath a root, also after a redirect."""

from __future__ import annotations

import posixpath
import re
import sys
from urllib.parse import unquote

import numpy as np
import pytest
from helpers import web_server as web
from helpers.web_server import Open, WebServer
from hypothesis import given
from hypothesis import strategies as st

from stampworker.config import FrameSettings
from stampworker.errors import ConfigError, FrameRefused, FrameUnavailable
from stampworker.frames import FrameStore
from stampworker.frames.urls import parse, parse_root

ALL = (slice(None), slice(None))


@pytest.mark.parametrize(
    "path",
    [
        "secret.fits",
        "data/../secret.fits",
        "data/%2e%2e/secret.fits",
        "data/.%2E/secret.fits",
        "data/%252e%252e/secret.fits",
        "data/%25252e%25252e/secret.fits",
        "data/..%2fsecret.fits",
        "data/..;x/secret.fits",
        "data/./a.fits",
        "data/..%5csecret.fits",
        "data%2fa.fits",
        "database/a.fits",
        "data/a.fits\r\nX: y",
        "data/a\tb",
        "data/a\\b",
        "data/%00",
        "",
    ],
)
def test_urls_outside_the_root(server: WebServer, open_store: Open, path: str) -> None:
    """Parents in any disguise, neighbours whose names begin alike and characters that split requests are refused."""
    with pytest.raises(FrameRefused, match=r"outside the frame roots|in the path|encoded|control characters"):
        open_store().open(server.url_of(path))
    assert server.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:PORT/data/a.fits",
        "http://127.0.0.1/data/a.fits",
        "http://localhost:PORT/data/a.fits",
        "http://127.1:PORT/data/a.fits",
        "http://2130706433:PORT/data/a.fits",
        "http://127.0.0.1:PORT@example.org/data/a.fits",
        "http://example.org/data/a.fits",
        "http:///data/a.fits",
        "http://[::1/data",
        "http://127.0.0.1:99999/data/a.fits",
        "http://exämple.org/data/a.fits",
        "s3://data/a.fits",
        "ftp://127.0.0.1:PORT/data/a.fits",
        "http:/data/a.fits",
    ],
)
def test_other_hosts(server: WebServer, open_store: Open, url: str) -> None:
    """Another host, another spelling of the same one, another port or scheme is refused."""
    with pytest.raises(FrameRefused, match=r"outside the frame roots|no host|not a URL|scheme|ASCII"):
        open_store().open(url.replace("PORT", str(server.server_port)))
    assert server.requests == []


@pytest.mark.parametrize(
    "root",
    [
        "az://container/x",
        "gs://u:hunter2@bucket/",
        "abfs://container@account.dfs.core.windows.net/",
        "ftp://host/",
        "https://u:hunter2@host/",
        "https://host/?key=hunter2",
        "https://",
        "https://u:hunter2@[::1/",
        "http://h/../x",
    ],
)
def test_roots_that_cannot_be(root: str) -> None:
    """A root of an unknown scheme, with credentials, or that is no URL stops the start, and shows no secret."""
    with pytest.raises(ConfigError, match=r"frames\.frame_roots: ") as caught:
        FrameStore(FrameSettings(frame_roots=(root,)))
    assert "hunter2" not in str(caught.value)


def test_redirects(server: WebServer, open_store: Open, pixels: np.ndarray) -> None:
    """Within the roots they are followed; to elsewhere, to another scheme, round and round they are not."""
    with WebServer() as other:
        other.files["/x/a.fits"] = server.files["/data/a.fits"]
        server.behaviours |= {
            "/data/1.fits": web.redirect("a.fits", 301),
            "/data/2.fits": web.redirect("/data/1.fits", 308),
            "/data/out.fits": web.redirect("/secret.fits"),
            "/data/up.fits": web.redirect("../secret.fits"),
            "/data/hidden.fits": web.redirect("%2e%2e/secret.fits"),
            "/data/other.fits": web.redirect(f"{other.url}x/a.fits?token=hunter2"),
            "/data/file.fits": web.redirect("file:///etc/hostname"),
            "/data/none.fits": lambda handler: handler.answer(302),
            "/data/round.fits": web.redirect("round.fits"),
        }
        store = open_store()
        for name in ("1.fits", "2.fits"):
            frame = store.open(name)
            np.testing.assert_array_equal(frame[ALL], pixels)
            assert frame.url == server.url_of(f"data/{name}")
        for name in ("out", "up", "other"):
            with pytest.raises(FrameRefused, match=rf"{name}\.fits: redirects to .*outside the frame roots") as caught:
                store.open(f"{name}.fits")
            assert "hunter2" not in str(caught.value)
        for name in ("file", "none"):
            with pytest.raises(FrameRefused, match=r"redirects to .*wanted http: or https:"):
                store.open(f"{name}.fits")
        with pytest.raises(FrameRefused, match=r"'%2e%2e' in the path"):
            store.open("hidden.fits")
        with pytest.raises(FrameUnavailable, match="more than 5 redirects"):
            store.open("round.fits")
        assert other.requests == []
        both = open_store(f"{server.url}data/", f"{other.url}x/")
        np.testing.assert_array_equal(both.open("other.fits")[ALL], pixels)
        assert "/secret.fits" not in {path for path, _ in server.requests}


@pytest.mark.parametrize("to", ["http://[", "//[", "http://[::1", "//127.0.0.1:99999/", "/secret.fits", "ftp://h/x"])
def test_redirects_to_nonsense(server: WebServer, open_store: Open, to: str) -> None:
    """A redirect to something other than a URL beneath a root is refused, and a burst asks once."""
    server.behaviours["/data/1.fits"] = web.redirect(to)
    store = open_store(failure_ttl_s=5.0)
    for _ in range(3):
        with pytest.raises(
            FrameRefused, match=r"/data/1\.fits: redirects to .*(not a URL|outside the frame|wanted http:)"
        ):
            store.open("1.fits")
    assert len(server.requests) == 1


PIECES = [*".;?@:% \t\\/", "..", "a", "é", "data", "2e", "%2e", "%2E", "%25", "%2f", "%5c", "%c0%ae"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.sampled_from(["http", "s3", "abfs", "memory"]))
def test_no_url_leaves_its_root(path: str, scheme: str) -> None:
    """Any text after the root: the URL is refused, or its path is beneath the root, however often it is decoded."""
    start = f"{scheme}://{'' if scheme == 'memory' else 'host/'}data/"
    root = parse_root(start)
    try:
        address = parse(start + path)
    except FrameRefused:
        return
    if not address.beneath(root):
        return
    asked = address.target.partition("?")[0] if scheme == "http" else "/" + address.target
    for _ in range(5):
        resolved = posixpath.normpath(re.sub(r";[^/]*", "", asked.replace("\\", "/")))
        assert resolved == "/data" or resolved.startswith("/data/")
        asked = unquote(asked, errors="surrogateescape")


def test_s3_root_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library an s3: root stops the start and names the extra."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'stampworker\[s3\]'"):
        FrameStore(FrameSettings(frame_roots=("s3://bucket/",)))
