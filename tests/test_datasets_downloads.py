"""Downloads, from a server on this machine: good, damaged, cut short, missing, tried again."""

import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pyro_vae.datasets import DATASETS, DataSet, Protocol, Source, Store, images, load
from pyro_vae.datasets.splits import as_filed
from pyro_vae.errors import CorruptFileError, DataError

BODY = bytes(range(256)) * 40


def md5(data: bytes) -> str:
    return f"md5:{hashlib.md5(data).hexdigest()}"


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Server:
    """What is served at which path, and what was asked for; `cut` breaks off half-way."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            body = state.files.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path in state.cut else body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("PYRO_VAE_DATA", "PYRO_VAE_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYRO_VAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left(folder: Path) -> list[Path]:
    """Every file below a folder, hidden ones too."""
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("checksum", [md5(BODY), sha256(BODY)])
def test_a_good_download_is_kept_and_not_repeated(
    server: Server, cache: Path, checksum: str
) -> None:
    server.files["/a/b.bin"] = BODY
    source = Source("set/b.bin", f"{server.url}/a/b.bin", checksum)
    for _ in range(2):
        path = Store.open().fetch(source)
        assert path == cache / "set" / "b.bin"
        assert path.read_bytes() == BODY
    assert server.asked == ["/a/b.bin"]
    assert left(cache) == [path]


@pytest.mark.parametrize(
    ("body", "cut", "error", "says"),
    [
        (BODY[:-1] + b"?", False, CorruptFileError, ["expected md5:", "found md5:", "10240"]),
        (BODY[:5000], False, CorruptFileError, [md5(BODY), md5(BODY[:5000]), "5000 bytes"]),
        (b"", False, CorruptFileError, [md5(BODY), "0 bytes"]),
        (BODY, True, CorruptFileError, ["broke off", "try again"]),
        (None, False, DataError, ["404", "by hand", "cache/set/b.bin", "PYRO_VAE_DATA"]),
    ],
    ids=["wrong", "short", "empty", "cut", "missing"],
)
def test_a_bad_download_leaves_nothing_and_the_next_one_works(
    server: Server,
    cache: Path,
    body: bytes | None,
    cut: bool,
    error: type[Exception],
    says: list[str],
) -> None:
    source = Source("set/b.bin", f"{server.url}/b.bin", md5(BODY))
    if body is not None:
        server.files["/b.bin"] = body
    server.cut = {"/b.bin"} if cut else set()
    with pytest.raises(error) as caught:
        Store.open().fetch(source)
    for words in [source.url, *says]:
        assert words in str(caught.value)
    assert type(caught.value) is error
    assert left(cache) == []
    server.files["/b.bin"] = BODY
    server.cut = set()
    assert Store.open().fetch(source).read_bytes() == BODY


def test_a_file_damaged_in_the_cache_is_fetched_anew(server: Server, cache: Path) -> None:
    server.files["/b.bin"] = BODY
    source = Source("set/b.bin", f"{server.url}/b.bin", md5(BODY))
    path = Store.open().fetch(source)
    path.write_bytes(BODY[:100])
    assert Store.open().fetch(source).read_bytes() == BODY
    assert len(server.asked) == 2


def test_no_network_says_what_to_put_where(server: Server, cache: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/b.bin"
    source = Source("set/b.bin", url, md5(BODY))
    with pytest.raises(DataError) as caught:
        Store.open().fetch(source)
    assert not isinstance(caught.value, CorruptFileError)
    for words in (url, str(cache / "set" / "b.bin"), "by hand"):
        assert words in str(caught.value)
    assert left(cache) == []


def test_without_a_checksum_nothing_is_downloaded(server: Server, cache: Path) -> None:
    server.files["/b.bin"] = BODY
    source = Source("set/b.bin", f"{server.url}/b.bin")
    with pytest.raises(DataError, match=r"checksum.*by hand: get it from .*b\.bin"):
        Store.open().fetch(source)
    assert server.asked == []
    (cache / "set").mkdir(parents=True)
    (cache / "set" / "b.bin").write_bytes(BODY)
    assert Store.open().fetch(source).read_bytes() == BODY


def test_a_cache_that_cannot_be_made_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PYRO_VAE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file.*PYRO_VAE_CACHE"):
        Store.open().fetch(Source("set/b.bin", f"{server.url}/b.bin", md5(BODY)))


def test_the_folder_comes_first_and_is_checked(
    server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("set/b.bin", f"{server.url}/b.bin", md5(BODY))
    mine = tmp_path / "mine" / "set" / "b.bin"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(BODY)
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "mine"))
    assert Store.open().fetch(source) == mine
    mine.write_bytes(BODY[1:])
    with pytest.raises(CorruptFileError, match=rf"{mine}: expected {md5(BODY)}, found md5:"):
        Store.open().fetch(source)
    assert mine.exists(), "a file of the user's is not ours to remove"
    assert server.asked == []


@pytest.mark.parametrize(
    ("raw", "fine"),
    [
        (gzip.compress(BODY, 1), True),
        (gzip.compress(BODY[1:], 1), False),
        (gzip.compress(BODY, 1)[:-9], False),
        (b"no gzip at all", False),
    ],
    ids=["repacked", "other", "truncated", "plain"],
)
def test_a_gzip_packed_anew_is_known_by_its_content(tmp_path: Path, raw: bytes, fine: bool) -> None:
    source = Source("b.gz", None, md5(gzip.compress(BODY, 9)), md5(BODY))
    (tmp_path / "b.gz").write_bytes(raw)
    store = Store.open(tmp_path)
    if fine:
        assert store.fetch(source) == tmp_path / "b.gz"
    else:
        with pytest.raises(CorruptFileError, match=r"b\.gz: expected md5:.*found md5:.*unpack"):
            store.fetch(source)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_load_from_a_mirror(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Four idx files through a server, the parser and `load`, at the paths of the data folder."""
    rng = np.random.default_rng(0)
    pixels = {"train": rng.integers(0, 256, (6, 28, 28)), "t10k": rng.integers(0, 256, (3, 28, 28))}
    sources = {}
    for name, x in pixels.items():
        labels = np.arange(len(x))
        raw = {
            f"{name}-images": struct.pack(">4B3I", 0, 0, 8, 3, *x.shape) + x.astype("u1").tobytes(),
            f"{name}-labels": struct.pack(">4BI", 0, 0, 8, 1, len(x))
            + labels.astype("u1").tobytes(),
        }
        for file, data in raw.items():
            packed = gzip.compress(data)
            server.files[f"/here/tiny/{file}.gz"] = packed
            sources[file] = Source(f"tiny/{file}.gz", "http://invalid.invalid/x", md5(packed))
    entry = DataSet(
        images.idx_reader(sources), (28, 28), {"all": Protocol(as_filed, "")}, "", scale=255
    )
    monkeypatch.setitem(DATASETS, "tiny", entry)
    mirror = f"{server.url}/here/"
    if how == "environment":
        monkeypatch.setenv("PYRO_VAE_MIRROR", mirror)
    data = load("tiny", mirror=mirror if how == "argument" else None)
    assert np.array_equal(data.train.x.numpy(), pixels["train"].reshape(6, -1).astype("f4") / 255)
    assert data.test.y.tolist() == [0, 1, 2]
    assert data.valid is None
    assert len(left(cache)) == 4
    server.files.clear()
    load("tiny", mirror=mirror)  # from the cache


@pytest.mark.data
def test_mnist_from_a_mirror(server: Server, cache: Path, real_data: Path) -> None:
    for file in (real_data / "mnist").iterdir():
        server.files[f"/mnist/{file.name}"] = file.read_bytes()
    broken = "/mnist/t10k-images-idx3-ubyte.gz"
    whole = server.files[broken]
    server.files[broken] = whole[:-100]
    with pytest.raises(CorruptFileError, match=r"t10k-images.*9fb629c4189551a2d022fa330f9573f3"):
        load("mnist", mirror=server.url)
    assert not (cache / broken[1:]).exists()
    server.files[broken] = whole
    data = load("mnist", mirror=server.url)
    assert len(data.train) == 50_000
    assert server.asked.count(broken) == 2
    assert len(server.asked) == 5, "what was whole is not fetched again"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "rows"), [("static_binarized_mnist", 50_000), ("frey_faces", 1565)]
)
def test_files_that_only_a_mirror_serves(
    server: Server, cache: Path, real_data: Path, name: str, rows: int
) -> None:
    """Repacked ones, whose checksum is known and that are published nowhere."""
    with pytest.raises(DataError, match="by hand"):
        load(name, mirror=server.url)
    assert left(cache) == []
    for file in (real_data / name).iterdir():
        server.files[f"/{name}/{file.name}"] = file.read_bytes()
    assert len(load(name, mirror=server.url).train) == rows
    server.files.clear()
    assert len(load(name, mirror=server.url).train) == rows  # from the cache
