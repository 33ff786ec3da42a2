"""Video files, written and read frame by frame."""

from __future__ import annotations

import functools
import io
import itertools
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from clips import write_variable
from PIL import Image
from torch import Tensor

from rbln_vae.levels import sample_of
from rbln_vae.videos import is_pattern, is_video, read_head, read_video, write_video

PATIENCE = 60
"""Seconds after which something that should happen won't."""


def clip(frames: int = 5, height: int = 48, width: int = 64) -> list[Tensor]:
    """Smooth pictures that H.264 keeps well: a gradient that moves."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return [
        torch.stack([2 * x + 8 * n, 3 * y, x + y], -1).clamp(0, 255).to(torch.uint8)
        for n in range(frames)
    ]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_video_that_is_written_is_read_again(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    assert write_video(path, clip(), fps=24) == 5
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 24
    found = list(read_video(path))
    assert [frame.shape for frame in found] == [(48, 64, 3)] * 5
    for frame, expected in zip(found, clip(), strict=True):
        assert (frame.float() - expected.float()).abs().mean() < 4
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_videos_of_phones_are_read_upright(tmp_path: Path, degrees: int) -> None:
    lying, shown = tmp_path / "lying.mp4", tmp_path / "shown.mp4"
    write_video(lying, clip(), fps=24)
    # The matrix of the header of the track, which players apply to what was recorded.
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    content = lying.read_bytes()
    matrix = content.index(b"tkhd") + 44
    rows = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    shown.write_bytes(content[:matrix] + rows + content[matrix + len(rows) :])
    pictures = list(read_video(shown))
    clockwise = -degrees // 90
    for picture, recorded in zip(pictures, read_video(lying), strict=True):
        assert torch.equal(picture, recorded.rot90(clockwise))
    head = read_head(shown)
    assert (head.height, head.width) == tuple(pictures[0].shape[:2])


def test_samples_are_written_as_the_pictures_that_show_them(tmp_path: Path) -> None:
    samples = [sample_of(picture.permute(2, 0, 1)) for picture in clip(3)]
    assert write_video(tmp_path / "%03d.png", samples) == 3
    assert write_video(tmp_path / "b%d.png", [sample[None] for sample in samples]) == 3
    for number, expected in enumerate(clip(3)):
        for name in (f"{number:03d}.png", f"b{number}.png"):
            picture = Image.open(tmp_path / name)
            assert picture.tobytes() == bytes(expected.flatten().tolist())


def test_frames_may_be_arrays(tmp_path: Path) -> None:
    write_video(tmp_path / "tensors.mp4", clip(3))
    arrays = [each.flip(0).numpy()[::-1] for each in clip(3)]
    for array in arrays:
        array.flags.writeable = False
    assert write_video(tmp_path / "arrays.mp4", arrays) == 3
    assert (tmp_path / "arrays.mp4").read_bytes() == (tmp_path / "tensors.mp4").read_bytes()


def test_pictures_keep_opacity_and_files_have_none(tmp_path: Path) -> None:
    levels = [torch.cat([picture, picture[..., :1]], 2) for picture in clip(3)]
    samples = [sample_of(each.permute(2, 0, 1)) for each in levels]
    assert write_video(tmp_path / "%d.png", samples) == 3
    for number, expected in enumerate(levels):
        picture = Image.open(tmp_path / f"{number}.png")
        assert picture.mode == "RGBA"
        assert picture.tobytes() == bytes(expected.flatten().tolist())
    with pytest.raises(ValueError, match=r"Opacity is kept in pictures, such as out/%05d\.png"):
        write_video(tmp_path / "clip.mp4", samples)


def test_frames_are_written_while_the_next_are_made(tmp_path: Path) -> None:
    def frames() -> Iterator[Tensor]:
        for number, picture in enumerate(clip(4)):
            names = [f"{before}.png" for before in range(number)]
            until(functools.partial(is_written, names))
            yield picture

    def is_written(names: list[str]) -> bool:
        return sorted(path.name for path in tmp_path.glob("[0-9].png")) == names

    assert write_video(tmp_path / "%d.png", frames()) == 4


def until(condition: Callable[[], bool]) -> None:
    """Return when it holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Slow(io.BytesIO):
    """A file that takes nothing until its gate is open, and then notes on which thread it does."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.gate, self.fails = threading.Event(), fails
        self.threads = set[int]()

    def write(self, data: Any, /) -> int:
        assert self.gate.wait(PATIENCE)
        self.threads.add(threading.get_ident())
        if self.fails:
            raise BrokenPipeError("nobody reads")
        return super().write(data)


def test_only_a_few_frames_wait_for_a_slow_file_and_their_order_is_kept() -> None:
    file, asked = Slow(), list[int]()

    def frames() -> Iterator[Tensor]:
        for number, picture in enumerate(clip(40)):
            asked.append(number)
            yield picture

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_video, file, frames())
        until(lambda: len(asked) >= 3)
        time.sleep(0.1)
        assert len(asked) <= 5  # one that is made, those that wait, and one that is written
        file.gate.set()
        assert writing.result(PATIENCE) == 40
    file.seek(0)
    with av.open(file) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for picture, expected in zip(found, clip(40), strict=True):
        assert abs(picture.astype(int) - expected.numpy().astype(int)).mean() < 4


def test_a_pipe_gets_each_frame_as_soon_as_it_is_there() -> None:
    sizes, file = list[int](), io.BytesIO()

    def frames() -> Iterator[Tensor]:
        for picture in clip(6):
            until(lambda: not sizes or file.tell() > sizes[-1])
            sizes.append(file.tell())
            yield picture

    assert write_video(file, frames(), fps=24) == 6
    assert sizes[0] == 0 and sizes == sorted(set(sizes))
    file.seek(0)
    with av.open(file) as container:
        assert container.streams.video[0].average_rate == 24
        assert len(list(container.decode(video=0))) == 6


def test_what_takes_no_more_ends_the_frames() -> None:
    file, asked = Slow(fails=True), list[int]()
    file.gate.set()

    def frames() -> Iterator[Tensor]:
        for number, picture in enumerate(itertools.cycle(clip())):
            asked.append(number)
            yield picture

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        write_video(file, frames())
    assert len(asked) <= 5
    assert threading.get_ident() not in file.threads


def test_frames_may_be_made_in_one_tensor(tmp_path: Path) -> None:
    def frames() -> Iterator[Tensor]:
        picture = torch.empty(48, 64, 3, dtype=torch.uint8)
        for each in clip(6):
            yield picture.copy_(each)

    write_video(tmp_path / "%d.png", frames())
    for number, expected in enumerate(clip(6)):
        picture = Image.open(tmp_path / f"{number}.png")
        assert picture.tobytes() == bytes(expected.flatten().tolist())
    write_video(tmp_path / "clip.mkv", frames())
    for frame, expected in zip(read_video(tmp_path / "clip.mkv"), clip(6), strict=True):
        assert (frame.float() - expected.float()).abs().mean() < 4


@pytest.mark.parametrize("name", ["clip.mp4", "%d.png"])
def test_what_fails_leaves_nothing_half_written(tmp_path: Path, name: str) -> None:
    def frames() -> Iterator[Tensor]:
        yield from clip(2)
        raise OSError(28, "No space left on device")

    (tmp_path / "clip.mp4").write_bytes(b"before")
    with pytest.raises(OSError, match="No space left"):
        write_video(tmp_path / name, frames())
    assert (tmp_path / "clip.mp4").read_bytes() == b"before"
    for path in tmp_path.iterdir():
        assert path.name in ("clip.mp4", "0.png", "1.png")
        if path.suffix == ".png":
            Image.open(path).load()


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    link = tmp_path / "clip.mp4"
    from rbln_vae import videos

    with pytest.raises(OSError):
        videos._write_file(full, "mp4", iter(clip(400)), 16)
    assert not link.exists()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames"),
        ([torch.zeros(5, 6, 7)], "expected"),
        (clip(1, 47, 64), "47x64, and videos have even sides"),
        ([*clip(1), *clip(1, 32, 32)], "32x32, and those before it 48x64"),
    ],
)
def test_frames_that_make_no_video_are_refused(
    tmp_path: Path, frames: list[Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "clip.mp4", frames)
    assert not list(tmp_path.iterdir())


def test_paths_and_rates_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file with one of"):
        write_video(tmp_path / "clip.txt", clip())
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "clip.mp4", clip(), fps=0)
    with pytest.raises(ValueError, match=r"written as PNG. Name them %d\.png"):
        write_video(tmp_path / "%d.jpg", clip())
    assert not list(tmp_path.iterdir())
    assert is_video("a/b.MP4") and is_video("a/%05d.png") and not is_video("a/b.safetensors")
    assert not is_pattern("100%.png") and not is_pattern("a%s%s.png")


def test_a_video_of_variable_rate_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    write_variable(path, clip())
    with pytest.raises(ValueError, match="variable frame rate"):
        list(read_video(path))


def test_rates_that_are_no_whole_ticks_are_constant(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mkv", clip(9), fps=30000 / 1001)
    assert len(list(read_video(tmp_path / "clip.mkv"))) == 9


def test_a_disk_that_fails_is_no_damaged_video(tmp_path: Path) -> None:
    unreadable = Path("/proc/self/mem")
    if not unreadable.exists():
        pytest.skip("needs a file that can be opened and not read")
    for read in (read_head, lambda path: list(read_video(path))):
        with pytest.raises(OSError, match="Input/output error"):
            read(unreadable)
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.mp4")


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="can't be read as a video"):
        next(read_video(tmp_path / "text.mp4"))
    write_video(tmp_path / "clip.mp4", itertools.islice(itertools.cycle(clip()), 40))
    shutil.copy(tmp_path / "clip.mp4", tmp_path / "cut.mp4")
    with (tmp_path / "cut.mp4").open("r+b") as file:
        file.truncate((tmp_path / "clip.mp4").stat().st_size // 2)
    with pytest.raises(ValueError, match=r"cut\.mp4"):
        list(read_video(tmp_path / "cut.mp4"))
