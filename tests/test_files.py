"""Writing: a crash, an error or a full disk leaves the old, the new, or what is clearly neither."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbln_vae.files import atomic_path, replaced_files

PATTERNS = ("*.rbln",)
MARKER = "config.json"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def save(path: Path, **content: str) -> None:
    with replaced_files(path, PATTERNS, MARKER) as new:
        for name, text in content.items():
            (new / name.replace("_", ".")).write_text(text)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


# One file


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_takes_its_place_when_the_block_ends(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == path.parent
        assert (path.read_bytes() if path.exists() else None) == old
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_error_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new")
    assert mode(tmp_path / "file") == 0o666 & ~umask
    assert os.umask(umask) == umask  # looking at it does not change it


# A directory


def test_a_new_directory_is_made_with_its_parents(tmp_path: Path, umask: int) -> None:
    save(tmp_path / "a" / "b", config_json="1")
    assert (tmp_path / "a" / "b" / "config.json").read_text() == "1"
    assert mode(tmp_path / "a" / "b") == 0o777 & ~umask
    assert names(tmp_path / "a") == ["b"]


def test_stale_parts_go_and_other_files_stay(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(path, config_json="old", encoder_rbln="old", decoder_rbln="old")
    (path / "README.md").write_text("kept")
    (path / "notes").mkdir()
    (path / "notes" / "deep.rbln").write_text("kept")
    (path / "link").symlink_to("README.md")
    path.chmod(0o750)
    save(path, config_json="new", decoder_rbln="new")
    assert names(path) == ["README.md", "config.json", "decoder.rbln", "link", "notes"]
    assert (path / "config.json").read_text() == (path / "decoder.rbln").read_text() == "new"
    assert (path / "README.md").read_text() == (path / "notes/deep.rbln").read_text() == "kept"
    assert (path / "link").readlink() == Path("README.md")
    assert mode(path) == 0o750
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_rolls_back(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "model"
    save(path, config_json="old", encoder_rbln="old")
    with pytest.raises(error), replaced_files(path, PATTERNS, MARKER) as new:
        (new / "config.json").write_text("half")
        raise error
    assert (path / "config.json").read_text() == "old"
    assert names(path) == ["config.json", "encoder.rbln"] and names(tmp_path) == ["model"]


def test_an_error_leaves_no_directory_that_was_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError), replaced_files(tmp_path / "model", PATTERNS, MARKER):
        raise OSError
    assert names(tmp_path) == []


def test_what_is_incomplete_has_no_marker(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(path, config_json="old", encoder_rbln="old")
    (path / "decoder.rbln").mkdir()  # in the way of a file
    (path / "decoder.rbln" / "file").write_text("kept")
    with pytest.raises(OSError):
        save(path, config_json="new", decoder_rbln="new")
    assert not (path / "config.json").exists()
    assert names(path) == ["decoder.rbln"]


def test_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", config_json="1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "1"


def test_a_file_is_not_taken_for_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="is a file"):
        save(tmp_path / "file", config_json="1")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_directory_stays_the_one_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a mount point, or where a process works."""
    path = tmp_path / "model"
    save(path, config_json="old", encoder_rbln="old")
    inode = path.stat().st_ino
    monkeypatch.chdir(path)
    save(Path(), config_json="new")
    assert Path.cwd() == path and path.stat().st_ino == inode
    assert names(Path()) == names(path) == ["config.json"]
    assert Path("config.json").read_text() == "new"


# Crashes


WRITER = """
import sys, pathlib
from rbln_vae.files import atomic_path, replaced_files
kind, path = sys.argv[1], pathlib.Path(sys.argv[2])
for number in range(10**9):
    text = str(number % 10) * 300_000
    if kind == "file":
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    else:
        with replaced_files(path, ("*.rbln",), "config.json") as temporary:
            for part in ("encoder.rbln", "decoder.rbln", "config.json"):
                (temporary / part).write_text(text)
    if number == 0:
        print("written", flush=True)
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_killed_process_leaves_the_old_the_new_or_no_marker(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    for turn in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, kind, str(path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.01 + 0.013 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = [path] if kind == "file" else sorted(p for p in path.iterdir() if p.is_file())
        texts = {p.read_text() for p in found}
        assert all(len(text) == 300_000 and len(set(text)) == 1 for text in texts)
        if kind == "file" or (path / "config.json").exists():
            assert len(texts) == 1 and len(found) == (1 if kind == "file" else 3)


LIMITED = """
import resource, signal, sys, pathlib, torch
from rbln_vae.artifact import Artifact, read_artifact
from rbln_vae.errors import RBLNArtifactError
from rbln_vae.graph.ir import Conv2d, Graph
def model(width):
    weight = torch.ones(width, 4, 8, 8)
    graph = Graph("part", ("x",), 4, ("y",), (Conv2d("y", "x", "w", None),), {"w": weight})
    return Artifact(graph, "reference", "float32")
path = pathlib.Path(sys.argv[1])
model(1).save(path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    model(1000).save(path)
except RBLNArtifactError as error:
    assert "can't be written" in str(error)
    assert read_artifact(path).graph.weights["w"].shape[0] == 1
    print(*(p.name for p in path.parent.iterdir()))
"""


def test_a_disk_without_room_keeps_the_old_artifact(tmp_path: Path) -> None:
    """A limit on the size of files, which needs no privileges, fails as a full disk does."""
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "part.rbln")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["part.rbln"]
