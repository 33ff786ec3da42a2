"""Atomic writing: after a crash, an error or a full disk the old is there whole, or the new is."""

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

from rbln_vae import files
from rbln_vae.files import atomic_directory, atomic_path

REPLACES = ("config.json", "*.rbln")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def save(path: Path, **content: str) -> None:
    with atomic_directory(path, REPLACES) as new:
        for name, text in content.items():
            (new / name.replace("_", ".")).write_text(text)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture(params=["in one step", "in two steps"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories exchanged as Linux does, and as where `renameat2` is missing."""
    if request.param == "in two steps":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


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


@pytest.mark.usefixtures("exchange")
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


def test_what_is_written_wins_over_a_file_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "README.md").write_text("old")
    (path / "notes").mkdir()
    (path / "notes" / "old").write_text("old")
    with atomic_directory(path, REPLACES) as new:
        (new / "README.md").write_text("new")
        (new / "notes").mkdir()
    assert (path / "README.md").read_text() == "new"
    assert names(path / "notes") == []


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_rolls_back(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "model"
    save(path, config_json="old", encoder_rbln="old")
    with pytest.raises(error), atomic_directory(path, REPLACES) as new:
        (new / "config.json").write_text("half")
        raise error
    assert (path / "config.json").read_text() == "old"
    assert names(path) == ["config.json", "encoder.rbln"] and names(tmp_path) == ["model"]


def test_an_error_between_two_steps_rolls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    save(path, config_json="old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if Path(target) == path and not self.name.endswith(".old"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        save(path, config_json="new")
    assert (path / "config.json").read_text() == "old" and names(tmp_path) == ["model"]


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


def test_files_are_copied_where_links_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    save(path, config_json="old")
    (path / "README.md").write_text("kept")

    def missing(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", missing)
    save(path, config_json="new")
    assert (path / "README.md").read_text() == "kept"


def test_the_working_directory_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchanging it would leave the process in a directory that is removed."""
    path = tmp_path / "model"
    save(path, config_json="old", encoder_rbln="old")
    (path / "README.md").write_text("kept")
    monkeypatch.chdir(path)
    save(Path(), config_json="new")
    assert Path.cwd() == path
    assert names(Path()) == names(path) == ["README.md", "config.json"]
    assert Path("config.json").read_text() == "new"


def test_an_error_in_the_working_directory_rolls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, config_json="old", encoder_rbln="old")
    monkeypatch.chdir(tmp_path)
    replace = os.replace

    def failing(source: object, target: object) -> None:
        if Path(str(target)).name == "decoder.rbln":
            raise OSError("no")
        replace(source, target)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        save(Path(), config_json="new", decoder_rbln="new")
    assert names(tmp_path) == ["config.json", "encoder.rbln"]
    assert Path("config.json").read_text() == Path("encoder.rbln").read_text() == "old"


@pytest.mark.parametrize("number", ["EBUSY", "EXDEV", "EPERM"])
def test_a_directory_that_cannot_be_exchanged_is_filled_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """A mount point, such as a volume of a container, can't be renamed."""
    import errno

    path = tmp_path / "model"
    save(path, config_json="old", encoder_rbln="old")
    inode = path.stat().st_ino

    def busy(*_: object) -> bool:
        raise OSError(getattr(errno, number), "busy")

    monkeypatch.setattr(files, "_exchange", busy)
    save(path, config_json="new")
    assert names(path) == ["config.json"] and (path / "config.json").read_text() == "new"
    assert path.stat().st_ino == inode and names(tmp_path) == ["model"]


# Crashes


WRITER = """
import sys, pathlib
from rbln_vae.files import atomic_directory, atomic_path
kind, path = sys.argv[1], pathlib.Path(sys.argv[2])
for number in range(10**9):
    text = str(number % 10) * 300_000
    if kind == "file":
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    else:
        with atomic_directory(path, ("*.rbln",)) as temporary:
            for part in ("encoder.rbln", "decoder.rbln"):
                (temporary / part).write_text(text)
    if number == 0:
        print("written", flush=True)
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_killed_process_leaves_the_old_or_the_new(tmp_path: Path, kind: str) -> None:
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
        found = [path] if kind == "file" else sorted(path.iterdir())
        texts = {p.read_text() for p in found}
        assert len(texts) == 1 and len(found) == (1 if kind == "file" else 2)
        (text,) = texts
        assert len(text) == 300_000 and len(set(text)) == 1


LIMITED = """
import resource, signal, sys, pathlib, torch
from rbln_vae.artifact import Artifact, read_artifact
from rbln_vae.errors import RBLNArtifactError
from rbln_vae.graph.ir import Conv2d, Graph
def model(width):
    weight = torch.ones(width, 4, 8, 8)
    graph = Graph("part", "x", 4, "y", (Conv2d("y", "x", "w", None),), {"w": weight})
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
