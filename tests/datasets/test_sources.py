"""Where images come from: what is found, in what order, and from the middle on."""

from __future__ import annotations

import functools
import io
import json
import pickle
import re
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, make_folder, picture

from rbln_vae.datasets.options import Options
from rbln_vae.datasets.pictures import Rejected, prepare
from rbln_vae.datasets.sources import Sample, Source, folder, open_source, tables
from rbln_vae.datasets.sources.files import read_file
from rbln_vae.errors import RBLNDatasetError

OPTIONS = Options(sizes=((32, 32),))
SIZING = OPTIONS.sizing(8)


def samples(source: Source, size: int = 4) -> list[Sample]:
    return [sample for split in source.splits(size) for sample in split.samples()]


def keys(source: Source, size: int = 4) -> list[str]:
    return [sample.key for sample in samples(source, size)]


def assert_can_begin_anywhere(source: Source, size: int = 4) -> None:
    """A split that was pickled and begins in its middle gives the rest of it."""
    for split in source.splits(size):
        whole = list(split.samples())
        again = pickle.loads(pickle.dumps(split))
        assert again.fingerprint() == split.fingerprint()
        for start in range(len(whole) + 1):
            assert list(again.samples(start)) == whole[start:]


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def shard(path: Path, numbers: range) -> Path:
    members = {}
    for number in numbers:
        members[f"{number:03d}.png"] = encoded(picture(number))
        members[f"{number:03d}.txt"] = f"caption {number}".encode()
        members[f"{number:03d}.json"] = json.dumps({"number": number}).encode()
        members[f"{number:03d}.cls"] = b"7"
    return tar(path, members)


# Folders


def test_a_folder_is_listed_by_name_with_what_stands_beside(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 8)
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    (tmp_path / "in" / "notes.md").write_text("")
    found = samples(open_source(tmp_path / "in"))
    assert [sample.key for sample in found] == [
        *("0000.jpg", "0002.webp", "0004.png", "0006.jpg"),
        *("more/0001.png", "more/0003.jpg", "more/0005.webp", "more/0007.png"),
    ]
    root = tmp_path / "in"
    assert found[0].image == str(root / "0000.jpg")
    assert found[0].sidecars == (str(root / "0000.json"), str(root / "0000.txt"))
    assert found[4].sidecars == ()
    assert open_source(root).count() == 8


@given(st.lists(st.text("ab.-_ é", min_size=1, max_size=4), unique=True, max_size=12))
def test_names_are_listed_in_pieces_as_they_are_at_once(names: list[str]) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        for name in names:
            if not name.startswith("."):
                (Path(directory) / f"{name}.png").touch()
                (Path(directory) / f"{name}.txt").touch()
        whole = list(open_source(directory, kind="folder")._files())  # type: ignore[attr-defined]
        patch.setattr(folder, "_NAMES_AT_ONCE", 3)
        assert list(open_source(directory, kind="folder")._files()) == whole  # type: ignore[attr-defined]
    images = [name for name in names if not name.startswith(".")]
    assert sorted(image for image, *_ in whole) == sorted(f"{name}.png" for name in images)
    assert all(sidecars == [f"{image[:-4]}.txt"] for image, *sidecars in whole)


def test_links_to_directories_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.png").touch()
    (tmp_path / "in" / "link").symlink_to("../other")
    (tmp_path / "other" / "up").symlink_to("../in")
    found = keys(open_source(tmp_path / "in", kind="folder"))
    assert found[:2] == ["b.png", "link/a.png"] and len(found) < 6


def test_a_folder_can_begin_anywhere(tmp_path: Path) -> None:
    assert_can_begin_anywhere(open_source(make_folder(tmp_path / "in", 9)))


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RBLNDatasetError, match="no images"):
        samples(open_source(tmp_path, kind="folder"))


# Tar shards


def test_members_of_one_name_are_a_sample_as_webdataset_has_it(tmp_path: Path) -> None:
    import webdataset

    for n in range(2):
        shard(tmp_path / f"{n:02d}.tar", range(5 * n, 5 * n + 5))
    found = samples(open_source(tmp_path))
    pattern = str(tmp_path / "{00..01}.tar")
    expected = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [s.key for s in found] == [f"{Path(e['__url__']).stem}/{e['__key__']}" for e in expected]
    assert [s.image for s in found] == [e["png"] for e in expected]
    assert [s.caption for s in found] == [e["txt"].decode() for e in expected]
    assert [s.columns for s in found] == [{"number": n, "cls": "7"} for n in range(10)]
    assert keys(open_source(pattern)) == [s.key for s in found]
    assert keys(open_source(tmp_path / "*.tar")) == [s.key for s in found]
    assert open_source(tmp_path).count() == 10


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_can_begin_anywhere(tmp_path: Path, suffix: str) -> None:
    shard(tmp_path / f"a{suffix}", range(5))
    assert_can_begin_anywhere(open_source(tmp_path / f"a{suffix}"))


def test_one_tar_of_many_samples_takes_little_memory(tmp_path: Path) -> None:
    """Tarfile itself would keep every header."""
    source = open_source(tar(tmp_path / "a.tar", {f"{n:05d}.png": b"x" for n in range(3000)}))
    (split,) = source.splits(10)
    for tar_file, _ in split._members():  # type: ignore[attr-defined]
        assert len(tar_file.members) <= 1


def test_what_a_damaged_tar_lost_is_told(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(6))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    found = samples(open_source(path))
    assert 2 <= len(found) <= 5
    assert all(sample.error is None for sample in found[:-1])
    assert "damaged" in str(found[-1].error)
    # A header in the middle that is none.
    header = content.index(b"003.png")
    path.write_bytes(content[:header] + b"\xff" * 512 + content[header + 512 :])
    found = samples(open_source(path))
    assert [sample.error for sample in found[:-1]] == [None, None]
    assert "damaged" in str(found[-1].error) and "002 and all after it" in str(found[-1].error)


def test_samples_without_an_image_and_repeated_ones_are_told(tmp_path: Path) -> None:
    one = encoded(picture(0))
    path = tar(
        tmp_path / "a.tar", {"a.png": one, "b.txt": b"only this", "c.png": one, "./a.jpg": one}
    )
    errors = {sample.key: sample.error for sample in samples(open_source(path))}
    assert errors["a/a"] is None and errors["a/c"] is None
    assert "no image" in str(errors["a/b"]) and "several" in str(errors["a/a#3"])
    assert len(errors) == 4


# Tables


def parquet(path: Path, numbers: range, rows: int) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    table = pyarrow.table(
        {
            "image": [{"bytes": encoded(picture(n)), "path": f"{n}.png"} for n in numbers],
            "text": [f"caption {n}" for n in numbers],
            "score": [n / 2 for n in numbers],
            "tags": [["a", str(n)] for n in numbers],
        }
    )
    write_table(table, path, row_group_size=rows)
    return path


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_rows_of_parquet_are_samples(tmp_path: Path, rows: int) -> None:
    (tmp_path / "sub").mkdir()
    parquet(tmp_path / "a.parquet", range(7), rows)
    parquet(tmp_path / "sub" / "b.parquet", range(7, 12), rows)
    found = samples(open_source(tmp_path))
    assert [s.key for s in found] == [
        *(f"a/{n:08d}" for n in range(7)),
        *(f"sub/b/{n:08d}" for n in range(5)),
    ]
    for n, sample in enumerate(found):
        assert sample.image == encoded(picture(n))
        assert sample.caption == f"caption {n}"
        assert sample.columns == {"text": f"caption {n}", "score": n / 2, "tags": ["a", str(n)]}
    assert open_source(tmp_path).count() == 12
    assert_can_begin_anywhere(open_source(tmp_path))


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    one = encoded(picture(1))
    (tmp_path / "beside.png").write_bytes(one)
    table = {"photo": [one, None], "file": ["beside.png", "gone.png"], "title": ["x", None]}
    write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(RBLNDatasetError, match="photo, file, title"):
        samples(open_source(tmp_path))
    first, second = samples(open_source(tmp_path, image_column="photo", caption_column="title"))
    assert (first.image, first.caption, second.error) == (
        one,
        "x",
        "the column photo holds no image",
    )
    first, _ = samples(open_source(tmp_path, image_column="file"))
    assert read_file(str(first.image)) == one


def test_a_file_that_is_no_parquet_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nonsense, and more of it")
    with pytest.raises(RBLNDatasetError, match=r"a\.parquet can't be read as Parquet"):
        samples(open_source(tmp_path))


def test_a_hugging_face_data_set_is_read_without_decoding(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    images = [picture(n) for n in range(6)]
    dataset = datasets.Dataset.from_dict(
        {"image": images, "text": [f"caption {n}" for n in range(6)], "n": list(range(6))},
        features=datasets.Features(
            image=datasets.Image(), text=datasets.Value("string"), n=datasets.Value("int64")
        ),
    )
    dataset.save_to_disk(tmp_path / "saved")
    for source in (open_source(dataset), open_source(tmp_path / "saved")):
        found = samples(source)
        assert [s.key for s in found] == [f"{n:08d}" for n in range(6)]
        assert [s.caption for s in found] == [f"caption {n}" for n in range(6)]
        assert [s.columns["n"] for s in found] == list(range(6))
        from PIL import Image

        for sample, image in zip(found, images, strict=True):
            assert isinstance(sample.image, bytes)
            np.testing.assert_array_equal(Image.open(io.BytesIO(sample.image)), image)
        assert_can_begin_anywhere(source)


# Other file systems


class _Ranges(SimpleHTTPRequestHandler):
    """Serves files as most servers do, and listings of directories."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if status := re.search(r"/status-(\d+)", self.path):
            self.send_error(int(status[1]))
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        piece = content[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        end = int(wanted[1]) + len(piece) - 1
        self.send_header("Content-Range", f"bytes {wanted[1]}-{end}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)


@pytest.fixture(params=["file", "memory", "http"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address at which another file system has the files of `tmp_path`."""
    if request.param == "http":
        handler = functools.partial(_Ranges, directory=str(tmp_path))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
    elif request.param == "file":
        yield f"file://{tmp_path}"
    else:
        yield "memory://data"


def put(remote: str, root: Path) -> None:
    """Bring the files to where they are read from."""
    if remote.startswith("memory"):
        fsspec.filesystem("memory").put(f"{root}/", "data/", recursive=True)


@pytest.mark.parametrize(
    "name", ["in", "tars", "tars/*.tar", "tars/{a,b}.tar", "tars/b.tar.gz", "tables", "a.parquet"]
)
def test_a_source_that_is_remote_gives_the_same(tmp_path: Path, remote: str, name: str) -> None:
    make_folder(tmp_path / "in", 8)
    for directory in ("tars", "tables"):
        (tmp_path / directory).mkdir()
    shard(tmp_path / "tars" / "a.tar", range(5))
    shard(tmp_path / "tars" / "b.tar", range(5, 8))
    shard(tmp_path / "tars" / "b.tar.gz", range(8, 10))
    parquet(tmp_path / "a.parquet", range(7), 3)
    parquet(tmp_path / "tables" / "b.parquet", range(7), 3)
    put(remote, tmp_path)
    local, source = open_source(tmp_path / name), open_source(f"{remote}/{name}")
    expected, found = samples(local), samples(source)
    assert [s.key for s in found] == [s.key for s in expected]
    for one, other in zip(expected, found, strict=True):
        assert content_of(other.image) == content_of(one.image)
        assert [content_of(s) for s in other.sidecars] == [content_of(s) for s in one.sidecars]
        assert (other.caption, other.columns, other.error) == (one.caption, one.columns, None)
    # Of a tar that is far away, counting would read all.
    assert source.count() in (len(expected), None)
    assert_can_begin_anywhere(source)


def content_of(image: bytes | str) -> bytes:
    return image if isinstance(image, bytes) else read_file(image)


@pytest.mark.parametrize("remote", ["http"], indirect=True)
def test_what_a_server_does_not_have_is_an_error(tmp_path: Path, remote: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*gone\.tar"):
        open_source(f"{remote}/gone.tar")
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(f"{remote}/gone")


@pytest.mark.parametrize("remote", ["http"], indirect=True)
def test_a_server_that_refuses_costs_an_image_and_one_that_fails_stops(remote: str) -> None:
    for status in (401, 403, 404, 410):
        found = prepare(Sample("key", f"{remote}/status-{status}.jpg"), OPTIONS, SIZING)
        assert isinstance(found, Rejected) and "can't be read" in found.reason
        assert f"status-{status}" in found.reason
    for status in (429, 500, 503):
        with pytest.raises(Exception, match=str(status)):
            prepare(Sample("key", f"{remote}/status-{status}.jpg"), OPTIONS, SIZING)


def test_an_address_that_nothing_opens_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RBLNDatasetError, match="foo://a/b can't be opened: Protocol not known"):
        open_source("foo://a/b")
    odd = {"class": "no_such_module.FileSystem", "err": "install oddfs"}
    monkeypatch.setitem(known_implementations, "odd", odd)
    with pytest.raises(RBLNDatasetError, match=r"odd://a\.tar can't be opened: install oddfs"):
        open_source("odd://a.tar")


# What a name stands for


def test_a_name_that_stands_for_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(tmp_path / "gone.tar")
    with pytest.raises(RBLNDatasetError, match=r"no \.parquet files"):
        open_source(tmp_path, kind="parquet")
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="name its kind"):
        open_source(tmp_path / "a.txt")
    with pytest.raises(TypeError, match="found a dict"):
        open_source({})
    with pytest.raises(ValueError, match="expected one of auto"):
        open_source(tmp_path, kind="zip")


def test_values_become_what_json_holds() -> None:
    import datetime

    value = {
        "time": datetime.datetime(2020, 1, 2, 3, 4),
        "text": "é".encode(),
        "bytes": b"\xff\x00",
        "nan": float("nan"),
        "list": [1, (True, None)],
    }
    expected = {
        "time": "2020-01-02T03:04:00",
        "text": "é",
        "bytes": "/wA=",
        "nan": None,
        "list": [1, [True, None]],
    }
    assert tables._json_value(value) == expected
