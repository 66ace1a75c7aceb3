"""The store: what may be read, what is kept, and what happens to files that change."""

import gc
import gzip
import itertools
import os
import threading
import time
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from helpers import Write

from stampworker.config import FrameSettings
from stampworker.errors import ConfigError, FrameCorrupt, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames import FrameStore
from stampworker.frames import store as frame_store
from stampworker.frames.fits import gunzip
from stampworker.frames.io import sources

ALL = (slice(0, 61), slice(0, 83))


@pytest.fixture
def tree(tmp_path: Path, write: Write, pixels: np.ndarray) -> Path:
    """Make root/a.fits inside, secret.fits outside, and links between them."""
    root = tmp_path / "root"
    (root / "night").mkdir(parents=True)
    secret = write("secret.fits", pixels)
    (root / "a.fits").write_bytes(secret.read_bytes())
    (tmp_path / "rootless.fits").write_bytes(secret.read_bytes())
    (root / "out.fits").symlink_to(secret)
    (root / "away").symlink_to(tmp_path)
    (root / "night" / "in.fits").symlink_to("../a.fits")
    return root


@pytest.mark.parametrize(
    "url",
    [
        *("../secret.fits", "night/../../secret.fits", "out.fits", "away/secret.fits", "file://ROOT/../secret.fits"),
        *("ROOT/../secret.fits", "TMP/secret.fits", "file://TMP/secret.fits", "file://ROOT/%2e%2e/secret.fits"),
        *("TMP/rootless.fits", "../none.fits", "/etc/hostname", "/dev/zero", "away/../secret.fits"),
    ],
)
def test_outside_the_roots(tree: Path, url: str) -> None:
    """Parents, links out of a root and folders whose names begin like a root are refused, existing or not."""
    with FrameStore(FrameSettings(frame_roots=(str(tree),))) as store:
        url = url.replace("ROOT", str(tree)).replace("TMP", str(tree.parent))
        with pytest.raises(FrameRefused, match=f"outside the frame roots.*frame_roots: {tree}"):
            store.open(url)


@pytest.mark.parametrize(
    "url", ["a.fits", "night/in.fits", "night/../a.fits", "away/root/a.fits", "file://ROOT/a.fits"]
)
def test_inside_the_roots(tree: Path, pixels: np.ndarray, url: str) -> None:
    """A file is read if it is beneath a root after links are resolved."""
    with FrameStore(FrameSettings(frame_roots=(str(tree / "night"), str(tree))), base=tree) as store:
        np.testing.assert_array_equal(store.open(url.replace("ROOT", str(tree)))[ALL], pixels)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://user:pass@example.org/a.fits", "http://example.org/a.fits: outside the frame roots"),
        ("s3://bucket/a.fits", "outside the frame roots"),
        ("gs://user:pass@bucket/a.fits", "gs://bucket/a.fits: an @ before the path"),
        (
            "az://user:pass@bucket/a.fits",
            "az://bucket/a.fits: scheme 'az', wanted a path or a URL: file:, http:, .*abfs:",
        ),
        ("ftp://x/a", "scheme 'ftp'"),
        ("file://elsewhere/a.fits", "file on host 'elsewhere'"),
        ("a\0.fits", "not a path"),
        ("", "not a path"),
        ("file://", "not a path"),
        ("ftp://user:pass@ho\u2100st/x", "<unreadable URL>: scheme 'ftp'"),
        ("ftp://[x/y", "scheme 'ftp'"),
        ("file://[/a", "<unreadable URL>: not a URL"),
        ("//[", "a host without a scheme"),
        ("//user:pass@host/a", "//host/a: a host without a scheme"),
        ("a\ud800.fits", r"'a\\ud800.fits': half of a character \(a surrogate\)"),
        ("ftp://user:pass@host/\udcff", "'ftp://host/.*half of a character"),
        ("a.fits#\ud800", r"'a.fits#\\ud800': half of a character"),
        ("a.fits#" + "9" * 5000, "a.fits: a fragment of 5000 characters, wanted an HDU's name or number"),
        ("./" * 5000 + "a.fits", "10006 characters, wanted a URL or path of at most 8192"),
    ],
)
def test_other_schemes(tree: Path, url: str, problem: str) -> None:
    """Other schemes and hosts, and text that is no path or URL, are refused, without credentials in the message."""
    with FrameStore(FrameSettings(frame_roots=(str(tree),))) as store:
        with pytest.raises(FrameRefused, match=problem) as caught:
            store.open(url)
        assert "pass" not in str(caught.value)


@pytest.mark.parametrize("proc", [True, False])
def test_a_folder_swapped_for_a_link(
    tree: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, proc: bool
) -> None:
    """A file is refused if its folder becomes a link out of the root while it is opened."""
    (tree / "night" / "secret.fits").write_bytes((tree / "a.fits").read_bytes())
    opener = os.open

    def swap(*given: Any) -> int:
        (tree / "night").rename(tree / "before")
        (tree / "night").symlink_to(tree.parent)
        return opener(*given)

    monkeypatch.setattr(os, "open", swap)
    if not proc:
        monkeypatch.setattr(Path, "readlink", lambda self: (_ for _ in ()).throw(FileNotFoundError(2, "no /proc")))
    with FrameStore(FrameSettings(frame_roots=(str(tree),))) as store:
        with pytest.raises(FrameRefused, match=f"outside the frame roots .the opened file is at {tree.parent}/secret"):
            store.open("night/secret.fits")
        monkeypatch.undo()
        np.testing.assert_array_equal(store.open("before/secret.fits")[ALL], pixels)


@pytest.mark.parametrize(
    ("root", "problem"),
    [
        ("TMP/none", "TMP/none', which is no folder, wanted a folder that is there, or a URL prefix"),
        ("TMP/secret.fits", "TMP/secret.fits', which is no folder"),
        ("~/frames", "'~/frames', which is no folder"),
        ("", "'', which is no folder"),
        ("http//host/", "'http//host/', which is no folder"),
        ("file://user:pass@other/TMP", "'file://other/TMP': file on host 'other', wanted a local one"),
        ("file://[/", "<unreadable URL>': not a URL"),
    ],
)
def test_roots_that_are_no_folders(tree: Path, root: str, problem: str) -> None:
    """A root that is neither an existing folder nor a URL is a ConfigError that names it."""
    root, problem = (text.replace("TMP", str(tree.parent)) for text in (root, problem))
    with pytest.raises(ConfigError, match=f"frames.frame_roots: found .*{problem}"):
        FrameStore(FrameSettings(frame_roots=(str(tree), root)))


def test_roots_as_urls(tree: Path) -> None:
    """A root may be a file: URL, and the local host may be named, in any case."""
    for host in ("", "localhost", "LOCALHOST"):
        with FrameStore(FrameSettings(frame_roots=(f"file://{host}{tree}",))) as store:
            assert store.open(f"file://{host}{tree}/a.fits").shape == (61, 83)


def test_without_roots(tree: Path, pixels: np.ndarray) -> None:
    """Without roots only allowed files are read; relative paths start from the base, by default the first root."""
    with FrameStore(FrameSettings(), allowed=[(tree / "a.fits").as_uri()]) as store:
        np.testing.assert_array_equal(store.open(str(tree / "a.fits"))[ALL], pixels)
        with pytest.raises(FrameRefused, match="frame_roots: none configured"):
            store.open(str(tree.parent / "secret.fits"))
        with pytest.raises(FrameRefused, match="a relative path, and no frame root is configured"):
            store.open("a.fits")
    with FrameStore(FrameSettings(frame_roots=(str(tree / "night"), str(tree.parent))), base=tree) as store:
        assert store.open("a.fits").url == (tree / "a.fits").as_uri()
        assert store.open("../secret.fits").shape == (61, 83)
    with FrameStore(FrameSettings(frame_roots=(str(tree.parent), str(tree)))) as store:
        assert store.open("root/a.fits").url == (tree / "a.fits").as_uri()


def test_url_is_quoted(tmp_path: Path, write: Write, store: FrameStore, pixels: np.ndarray) -> None:
    """Blanks and special characters in a name become a file: URL that opens the same frame."""
    path = write("a b%20[1].fits", pixels)
    frame = store.open(str(path) + "#0")
    assert frame.url == path.as_uri() + "#0"
    np.testing.assert_array_equal(store.open(frame.url)[ALL], pixels)


def test_things_that_are_no_files(tmp_path: Path, store: FrameStore) -> None:
    """A directory, a pipe, a link to itself and a name of 300 characters do not hang; each has its own message."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FrameCorrupt, match="a directory, wanted a FITS file"):
        store.open(str(tmp_path))
    with pytest.raises(FrameRefused, match="pipe: neither file nor directory"):
        store.open("pipe")
    for name in ("loop", "x" * 300, "none.fits", "loop/a.fits"):
        with pytest.raises(FrameMissing, match="no such file"):
            store.open(name)


def test_permission_denied(write: Write, store: FrameStore, pixels: np.ndarray) -> None:
    """A file without read permission is unavailable, because the permission may be given later."""
    path = write("a.fits", pixels)
    path.chmod(0)
    path.parent.chmod(0o755)
    for parent in path.parents[1:4]:
        if parent.stat().st_uid == os.getuid() and parent.name.startswith("pytest"):
            parent.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(FrameUnavailable, match=r"a\.fits: cannot be opened: Permission denied"):
            store.open(str(path))
    finally:
        os.seteuid(user)


def descriptors(folder: Path) -> int:
    """Count the descriptors of this process that lead into a folder."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += str(link.readlink()).startswith(str(folder))
        except FileNotFoundError:
            continue
    return count


def test_open_files_are_bounded(tmp_path: Path, write: Write, pixels: np.ndarray) -> None:
    """At most max_open_frames descriptors are open, one per file, and close closes all."""
    paths = [write(f"{i}.fits", pixels + i) for i in range(12)]
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),), max_open_frames=4)) as store:
        for _ in range(2):
            for i, path in enumerate(paths):
                np.testing.assert_array_equal(store.open(str(path))[ALL], pixels + i)
                assert descriptors(tmp_path) <= 5
        kept = store.open(str(paths[-1]))
        assert store.open(str(paths[-1])) is kept
        for other in (paths[-1].as_uri(), str(paths[-1]) + "#0"):
            assert store.open(other)._pixels is kept._pixels
        assert descriptors(tmp_path) == 4
    del kept
    assert descriptors(tmp_path) == 0
    with pytest.raises(ValueError, match="this FrameStore is closed"):
        store.open(str(paths[0]))


@pytest.mark.parametrize("kind", ["gzip", "tiled"])
def test_files_are_let_go_of_without_the_collector(tmp_path: Path, write: Write, pixels: np.ndarray, kind: str) -> None:
    """A file that the store dropped and nobody refers to is closed at once, not by the garbage collector."""
    data = gzip.compress(write("plain.fits", pixels).read_bytes())
    if kind == "tiled":
        fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(pixels)]).writeto(tmp_path / "tiled.fits")
        data = (tmp_path / "tiled.fits").read_bytes()
    for i in range(6):
        (tmp_path / f"{i}.fits").write_bytes(data)
    gc.collect()
    gc.disable()
    try:
        with FrameStore(FrameSettings(frame_roots=(str(tmp_path),), max_open_frames=2)) as store:
            opened = [weakref.ref(store.open(f"{i}.fits")) for i in range(6)]
            assert [frame() is None for frame in opened] == [True] * 4 + [False] * 2
    finally:
        gc.enable()


def test_names_of_one_frame_are_not_many_frames(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different names of one HDU share its table of tiles, its tiles and its WCS; each frame keeps its URL."""
    monkeypatch.setattr(frame_store, "_MAX_OPENED", 20)
    hdus = [fits.PrimaryHDU(), fits.CompImageHDU(pixels, name="sciences", tile_shape=(8, 8))]
    fits.HDUList(hdus).writeto(tmp_path / "a.fits")
    cases = [f"a.fits#{''.join(letters)}" for letters in itertools.product(*zip("scienc", "SCIENC", strict=True))]
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),))) as store:
        frames = [store.open(f"{'./' * i}{name}es") for i, name in enumerate(cases)]
        frames += [store.open(name) for name in ("a.fits", "a.fits#1", "a.fits#001", "a.fits#sciences,1")]
        assert len({frame.url for frame in frames}) == len(frames) == 68
        assert len({id(frame._pixels) for frame in frames}) == 1
        assert len({id(frame.header) for frame in frames}) == 1
        assert len(store._opened) == 20
        assert store.open("a.fits#1", mask=True).dtype.kind == "u"
        assert store.open("a.fits#1").dtype.kind == "f"
        assert store.open("a.fits#001") is store.open("a.fits#001")


def test_evicted_frames_stay_readable(tmp_path: Path, write: Write, pixels: np.ndarray) -> None:
    """A frame still gives its pixels after the store dropped it or was closed."""
    paths = [write(f"{i}.fits", pixels + i) for i in range(3)]
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),), max_open_frames=1)) as store:
        frames = [store.open(str(path)) for path in paths]
    for i, frame in enumerate(frames):
        np.testing.assert_array_equal(frame[ALL], pixels + i)


def test_failed_opens_leave_nothing(tmp_path: Path, store: FrameStore) -> None:
    """A hundred corrupt files leave no descriptor open."""
    for i in range(100):
        (tmp_path / f"{i}.fits").write_bytes(b"SIMPLE  = " + bytes(3000))
        with pytest.raises(FrameCorrupt, match=r"BITPIX|END card"):
            store.open(f"{i}.fits")
    assert descriptors(tmp_path) == 0


def test_gzip_is_bounded(tmp_path: Path, write: Write, pixels: np.ndarray) -> None:
    """Decompressed files are kept within cache_bytes and decompressed again when needed; a bomb is refused."""
    raw = [write(f"{i}.fits", pixels + i).read_bytes() for i in range(4)]
    for i, data in enumerate(raw):
        (tmp_path / f"{i}.gz").write_bytes(gzip.compress(data))
    settings = FrameSettings(frame_roots=(str(tmp_path),), cache_bytes=2 * len(raw[0]) + 9)
    with FrameStore(settings) as store:
        frames = [store.open(f"{i}.gz") for i in range(4)]
        for i in (0, 1, 2, 3, 0, 3):
            np.testing.assert_array_equal(frames[i][ALL], pixels + i)
            assert 0 < store.cached_bytes <= 2 * len(raw[0])
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(raw[0] + bytes(20_000_000)))
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),), max_decompressed_bytes=1_000_000)) as store:
        with pytest.raises(FrameRefused, match=r"bomb\.gz: decompresses to more than the 1000000 bytes allowed"):
            store.open("bomb.gz")
        np.testing.assert_array_equal(store.open("1.gz")[ALL], pixels + 1)


def test_no_more_is_decompressed_than_there_are_hdus(
    tmp_path: Path, write: Write, store: FrameStore, pixels: np.ndarray
) -> None:
    """Zeros after the last HDU are not decompressed; an HDU above the limit is refused when its header is read."""
    raw = write("a.fits", pixels).read_bytes()
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(raw + bytes(50_000_000)))
    np.testing.assert_array_equal(store.open("zeros.gz")[ALL], pixels)
    assert store.cached_bytes < 4_000_000
    (tmp_path / "large.gz").write_bytes(
        gzip.compress(raw.replace(b"NAXIS2  =                   61", b"NAXIS2  =             90000000"))
    )
    with pytest.raises(
        FrameRefused, match=r"large\.gz: decompresses to more than .*\(frames\.max_decompressed_bytes\)"
    ):
        store.open("large.gz")
    fits.HDUList([fits.PrimaryHDU(), *(fits.ImageHDU(pixels + i) for i in range(300))]).writeto(tmp_path / "m.fits")
    (tmp_path / "many.gz").write_bytes(gzip.compress((tmp_path / "m.fits").read_bytes(), 1))
    for i in (1, 300):
        np.testing.assert_array_equal(store.open(f"many.gz#{i}")[ALL], pixels + (i - 1))


def test_a_gzip_file_of_many_members(tmp_path: Path, write: Write, store: FrameStore, pixels: np.ndarray) -> None:
    """A file of many empty members and some large ones costs time in proportion to its size."""
    raw, empty = write("a.fits", pixels).read_bytes(), gzip.compress(b"") * 25_000
    noise = np.random.default_rng(5).bytes(3_000_000)
    path = tmp_path / "a.gz"
    path.write_bytes(
        empty + gzip.compress(raw[:9000]) + empty + gzip.compress(raw[9000:]) + gzip.compress(noise) + empty
    )
    began = time.process_time()
    np.testing.assert_array_equal(store.open("a.gz")[ALL], pixels)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(("elsewhere", "error"), [(0.0, FrameRefused), (0.15, FrameUnavailable)])
def test_decompression_ends(
    tmp_path: Path, write: Write, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, elsewhere: float, error: type
) -> None:
    """A file that is not decompressed in total_s is refused, or unavailable if the time went elsewhere."""
    (tmp_path / "a.gz").write_bytes(gzip.compress(write("a.fits", pixels).read_bytes()))
    settings = FrameSettings(frame_roots=(str(tmp_path),), total_s=0.2)
    end_of_hdus = gunzip._end_of_hdus
    monkeypatch.setattr(gunzip, "_end_of_hdus", lambda *given: (time.sleep(0.21 - elsewhere), end_of_hdus(*given))[1])
    with FrameStore(settings) as store, store.allowance():
        time.sleep(elsewhere)
        with pytest.raises(error, match=r"a\.gz: not decompressed after .* with 0\.2 s for all \(frames\.total_s\)"):
            store.open("a.gz")


def test_limits(tmp_path: Path, write: Write, pixels: np.ndarray) -> None:
    """A header or an axis above its limit is refused, and the message names the setting."""
    path = write("a.fits", pixels, **{f"KEY{i}": "x" * 60 for i in range(400)})
    store = FrameStore(FrameSettings(frame_roots=(str(tmp_path),), max_header_bytes=5760))
    with pytest.raises(FrameRefused, match=r"a\.fits: HDU 0: header above 5760 bytes \(max_header_bytes\)"):
        store.open(str(path))
    store = FrameStore(FrameSettings(frame_roots=(str(tmp_path),), max_axis=80))
    with pytest.raises(FrameRefused, match=r"shape \(61, 83\), above max_axis \(80\)"):
        store.open(str(path))


def many_headers(path: Path, headers: int, cards: int) -> None:
    """Write empty HDUs of long headers, an image after the first half of them, and one after all."""
    empty = fits.ImageHDU()
    empty.header.extend([(f"K{i}", i) for i in range(cards)])
    filler = [empty] * (headers // 2)
    fits.HDUList([fits.PrimaryHDU(), *filler, fits.ImageHDU(np.eye(3)), *filler, fits.ImageHDU(np.eye(4))]).writeto(
        path
    )


def test_headers_of_a_file_are_bounded(tmp_path: Path) -> None:
    """If headers are above the limit only together, images before that limit still open."""
    many_headers(tmp_path / "a.fits", 40, 300)
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),), max_header_bytes=28_800)) as store:
        assert store.open("a.fits").shape == (3, 3)
        for _ in range(2):
            with pytest.raises(
                FrameRefused, match=r"a\.fits.*\d bytes of headers up to HDU 3\d, above 32 times max_he"
            ):
                store.open("a.fits#42")


def test_headers_that_were_passed_are_let_go_of(tmp_path: Path, store: FrameStore) -> None:
    """The headers of HDUs before an image are not kept; they are read again when needed."""
    many_headers(tmp_path / "a.fits", 24, 1000)
    tracemalloc.start()
    try:
        kept = store.open("a.fits#26")
        assert tracemalloc.get_traced_memory()[0] < 1_000_000 < (tmp_path / "a.fits").stat().st_size
    finally:
        tracemalloc.stop()
    assert kept.shape == (4, 4)
    np.testing.assert_array_equal(store.open("a.fits#13")[0:3, 0:3], np.eye(3))
    assert store.open("a.fits#13").header["NAXIS1"] == 3


def test_replaced_file_is_read_again(write: Write, tmp_path: Path, store: FrameStore, pixels: np.ndarray) -> None:
    """The next open notices that a file was replaced or removed; the old frame keeps the old pixels."""
    path = write("a.fits", pixels)
    old = store.open("a.fits")
    write("b.fits", pixels + 1).replace(path)
    np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels + 1)
    np.testing.assert_array_equal(old[ALL], pixels)
    path.unlink()
    with pytest.raises(FrameMissing, match="no such file"):
        store.open("a.fits")


@pytest.mark.parametrize("mapped", [True, False])
def test_file_that_shrinks_while_open(
    write: Write, store: FrameStore, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    """A file that shrinks while it is open is unavailable and does not kill the process; restored, it is read again."""
    if not mapped:
        monkeypatch.setattr(sources, "MappedFile", _unmappable)
    rng = np.random.default_rng(3)
    data = rng.normal(size=(500, 400)).astype("f4")
    path = write("a.fits", data)
    raw = path.read_bytes()
    frame = store.open("a.fits")
    np.testing.assert_array_equal(frame[20:40, 5:9], data[20:40, 5:9])
    os.truncate(path, 4096)
    for rows in (slice(400, 430), slice(20, 40)):
        with pytest.raises(FrameUnavailable, match=r"a\.fits: the file shrank from"):
            frame[rows, 5:9]
    with pytest.raises(FrameCorrupt, match="truncated"):
        store.open("a.fits")
    path.write_bytes(raw)
    np.testing.assert_array_equal(store.open("a.fits")[400:430, 5:9], data[400:430, 5:9])


def _unmappable(fd: int, url: str) -> None:
    raise OSError(22, "no map")


def test_files_read_by_position(
    write: Write, tmp_path: Path, store: FrameStore, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be mapped has the same pixels, and one descriptor."""
    monkeypatch.setattr(sources, "MappedFile", _unmappable)
    frame = store.open(str(write("a.fits", pixels)))
    np.testing.assert_array_equal(frame[ALL], pixels)
    np.testing.assert_array_equal(frame[3:9, 70:90], pixels[3:9, 70:90])
    assert descriptors(tmp_path) == 1
    store.close()
    del frame
    assert descriptors(tmp_path) == 0


def test_only_the_rows_are_read(
    write: Write, store: FrameStore, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A section that is read by position reads the bytes of its rows and no others."""
    monkeypatch.setattr(sources, "MappedFile", _unmappable)
    frame = store.open(str(write("a.fits", pixels)))
    asked: list[tuple[int, int]] = []
    read = sources.PositionedFile.read

    def spy(self: sources.PositionedFile, offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return read(self, offset, length)

    monkeypatch.setattr(sources.PositionedFile, "read", spy)
    frame[10:14, 5:9]
    assert asked == [(2880 + 10 * 83 * 4, 4 * 83 * 4)]


def test_threads_share_a_store(tmp_path: Path, write: Write, pixels: np.ndarray) -> None:
    """Threads that open, evict and slice the same frames at once see the right pixels and no error."""
    for i in range(6):
        path = write(f"{i}.fits", pixels + i, CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CDELT1=1e-4, CDELT2=1e-4)
        (tmp_path / f"{i}.gz").write_bytes(gzip.compress(path.read_bytes()))
    settings = FrameSettings(frame_roots=(str(tmp_path),), max_open_frames=3, cache_bytes=50_000)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(150):
            i, y, x = (int(n) for n in rng.integers(0, (6, 50, 70)))
            frame = store.open(f"{i}.{rng.choice(['fits', 'gz'])}")
            if not np.array_equal(frame[y : y + 9, x : x + 9], (pixels + i)[y : y + 9, x : x + 9], equal_nan=True):
                wrong.append((i, y, x))
            if frame.wcs is None or frame.header["NAXIS1"] != 83:
                wrong.append(frame.wcs_problem)

    with FrameStore(settings) as store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert store.open("0.fits") is store.open("0.fits")
