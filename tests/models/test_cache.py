"""Compiled parts are kept on disk and found again, and nothing that is there can do harm."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from processes import PATHS, in_a_process
from vaes import default_compiled, default_vae, make_vae, noise, pixels, save_vae

import rbln_vae.rebel
from rbln_vae import RBLNAutoencoderKL
from rbln_vae.artifact import Artifact
from rbln_vae.models import cache as caching
from rbln_vae.models.cache import Cache, key_of
from rbln_vae.targets.base import get_target

CPU = get_target("cpu")
OPTIONS = {"target": "cpu", "dtype": "float32"}
LATENT = noise(1, 4, 5, 4)
FILES = {"decoder.rbln", "encoder.rbln", "key.json"}


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    """The cache of the user, empty."""
    monkeypatch.setenv("RBLN_VAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The parts that are compiled from now on, by name."""
    parts: list[str] = []
    compile_module = CPU.compile_module

    def counting(module: Any, options: Any) -> Any:
        parts.append(options.part)
        return compile_module(module, options)

    monkeypatch.setattr(CPU, "compile_module", counting)
    return parts


def make(vae: AutoencoderKL | None = None, **options: Any) -> RBLNAutoencoderKL:
    config = {**OPTIONS, "uses_encoder": False, **options}
    return RBLNAutoencoderKL.from_model(vae or default_vae(), rbln_config=config, cache=True)


def entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


# What is found again


def test_the_second_time_nothing_is_compiled_and_the_bits_are_the_same(directory, compiled):
    first = make(uses_encoder=True)
    assert compiled == ["encoder", "decoder"]
    second = make(uses_encoder=True)
    assert len(compiled) == 2
    assert torch.equal(pixels(first, LATENT), pixels(second, LATENT))
    assert second.rbln_config == first.rbln_config
    assert second.resolved_config == first.resolved_config
    assert second.config == first.config
    (entry,) = entries(directory)
    assert {file.name for file in entry.iterdir()} == FILES


def test_options_of_the_run_may_differ(directory, compiled):
    make()
    again = make(num_threads=1, memory_limit="1GiB", timeout=5)
    assert compiled == ["decoder"]
    assert again.rbln_config.num_threads == 1 and again.rbln_config.timeout == 5


def test_a_model_that_is_compiled_by_name_is_kept(directory, compiled, tmp_path):
    source = save_vae(default_vae(), tmp_path / "vae")
    first, second = (
        RBLNAutoencoderKL.from_pretrained(source, export=True, rbln_config=OPTIONS)
        for _ in range(2)
    )
    assert compiled == ["encoder", "decoder"]
    assert torch.equal(pixels(first, LATENT), pixels(second, LATENT))


def test_a_model_from_the_cache_is_saved_like_any_other(directory, tmp_path):
    make()
    make().save_pretrained(tmp_path / "saved")
    for entry in entries(directory):
        (entry / "decoder.rbln").unlink()
    loaded = RBLNAutoencoderKL.from_pretrained(tmp_path / "saved")
    assert torch.equal(pixels(loaded, LATENT), pixels(make(), LATENT))


def test_a_loaded_model_is_kept_only_if_told(directory, compiled):
    for _ in range(2):
        RBLNAutoencoderKL.from_model(default_vae(), rbln_config=OPTIONS)
    assert len(compiled) == 4
    assert not directory.exists()


def test_off_keeps_nothing(directory, compiled, monkeypatch):
    monkeypatch.setenv("RBLN_VAE_CACHE", "off")
    make()
    make()
    assert compiled == ["decoder", "decoder"]
    assert not directory.exists()


def test_it_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("RBLN_VAE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.of_user().directory == tmp_path / "rbln-vae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Cache.of_user().directory == Path.home() / ".cache" / "rbln-vae"
    monkeypatch.setenv("RBLN_VAE_CACHE", "~/compiled")
    assert Cache.of_user().directory == Path.home() / "compiled"


def test_models_for_an_npu_are_kept(directory):
    rbln_vae.rebel.install()
    try:
        vaes = [make(target="rbln", sample_size=16, batch_size=1) for _ in range(2)]
        latent = noise(1, 4, 8, 8)
        assert torch.equal(*(pixels(vae, latent) for vae in vaes))
        assert len(entries(directory)) == 1
    finally:
        del sys.modules["rebel"]


# What the key depends on


def key(vae: AutoencoderKL, **changes: Any) -> dict[str, Any]:
    arguments = {"name": "vae", "config": vae.config, "options": OPTIONS, "target": CPU, **changes}
    found = key_of(vae, **arguments)
    assert found is not None
    return dict(found)


def test_the_key_is_the_same_for_the_same():
    assert key(make_vae()) == key(make_vae())


def test_running_a_model_does_not_change_its_key():
    vae = make_vae()
    before = key(vae)
    pixels(vae, LATENT)
    vae.encode(noise(1, 3, 16, 16))
    assert key(vae) == before


def flip(tensor: torch.Tensor, byte: int) -> None:
    tensor.detach().reshape(-1).view(torch.uint8)[byte] ^= 1


def every_weight() -> list[str]:
    return list(default_vae().state_dict())


@pytest.mark.parametrize("name", every_weight())
def test_the_key_changes_with_the_first_and_the_last_byte_of_each_weight(name):
    vae = make_vae()
    keys = [key(vae)]
    for byte in (0, -1):
        flip(vae.state_dict()[name], byte)
        keys.append(key(vae))
    assert all(keys.count(each) == 1 for each in keys)


def test_the_key_changes_with_the_dtype_of_the_weights():
    vae = make_vae()
    assert key(copy.deepcopy(vae).half()) != key(vae)


def circular(vae: AutoencoderKL) -> None:
    vae.decoder.conv_in.padding_mode = "circular"


def rescaled(vae: AutoencoderKL) -> None:
    vae.decoder.mid_block.resnets[0].output_scale_factor = 2.0


def exchanged(vae: AutoencoderKL) -> None:
    vae.decoder.conv_act = torch.nn.ReLU()


@pytest.mark.parametrize("change", [circular, rescaled, exchanged])
def test_the_key_changes_with_the_modules(change: Callable[[AutoencoderKL], None]):
    vae = make_vae()
    before = key(vae)
    change(vae)
    assert key(vae) != before


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"config": {**default_vae().config, "scaling_factor": 0.5}},
        {"options": {**OPTIONS, "dtype": "bfloat16"}},
        {"target": get_target("reference")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_key_changes_with_what_is_asked_for(changes):
    assert key(default_vae(), **changes) != key(default_vae())


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (caching, "FORMAT_VERSION", 999),
        (caching, "__version__", "999"),
        (torch, "__version__", "999"),
        (diffusers, "__version__", "999"),
        (caching, "_digest_of_package", lambda: "999"),
        (type(CPU), "arithmetic", 999),
        (type(CPU), "toolchain", lambda self: "999"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_key_changes_with_what_compiles(monkeypatch, where, name, value):
    before = key(default_vae())
    monkeypatch.setattr(where, name, value)
    assert key(default_vae()) != before


def patched(vae: AutoencoderKL) -> None:
    conv = vae.decoder.conv_in
    forward = conv.forward
    conv.forward = lambda x: 2 * forward(x)


def hooked(vae: AutoencoderKL) -> None:
    vae.decoder.conv_in.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize("change", [patched, hooked])
def test_a_model_with_functions_of_someone_else_is_compiled_each_time(directory, compiled, change):
    vae = make_vae()
    make(vae)
    change(vae)
    for _ in range(2):
        make(vae)
    assert compiled == ["decoder"] * 3
    assert len(entries(directory)) == 1


# What is damaged


def truncate(entry: Path) -> None:
    file = entry / "decoder.rbln"
    os.truncate(file, file.stat().st_size // 2)


def alter(entry: Path) -> None:
    file = entry / "decoder.rbln"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.unlink()  # the first model reads the old one
    file.write_bytes(data)


def remove_part(entry: Path) -> None:
    (entry / "decoder.rbln").unlink()


def remove_key(entry: Path) -> None:
    (entry / "key.json").unlink()


def garble_key(entry: Path) -> None:
    (entry / "key.json").write_bytes(b"\xff{")


def take_the_place_of_another(entry: Path) -> None:
    other = make(make_vae(seed=1))
    assert other is not None
    (found,) = (each for each in entries(entry.parent) if each != entry)
    for file in entry.iterdir():
        file.unlink()
        (found / file.name).rename(entry / file.name)


@pytest.mark.parametrize(
    "damage",
    [truncate, alter, remove_part, remove_key, garble_key, take_the_place_of_another],
)
def test_a_damaged_entry_is_made_anew(directory, compiled, damage):
    expected = pixels(make(), LATENT)
    (entry,) = entries(directory)
    damage(entry)
    compiled.clear()
    assert torch.equal(pixels(make(), LATENT), expected)
    assert torch.equal(pixels(make(), LATENT), expected)
    assert compiled == ["decoder"]


def test_a_damaged_entry_counts_and_is_removed_in_its_turn(directory):
    make()
    (entry,) = entries(directory)
    remove_key(entry)
    cache = Cache(directory)
    (found,) = cache.entries()
    assert found.key == {} and found.size == (entry / "decoder.rbln").stat().st_size
    Cache(directory, limit=1)._shrink()
    assert entries(directory) == []


# The limit


def fill(cache: Cache, *names: str) -> None:
    """Write entries, each a second later than the one before."""
    for seconds, name in enumerate(names):
        cache.save({"model": name}, {"decoder": default_compiled().compiled_models["decoder"]})
        os.utime(cache._entry({"model": name}), (seconds, seconds))


def held(cache: Cache) -> list[str]:
    return [entry.key["model"] for entry in cache.entries()]


def test_the_least_recently_used_go_first(tmp_path):
    fill(Cache(tmp_path), "a", "b", "c")
    size = Cache(tmp_path).entries()[0].size
    cache = Cache(tmp_path, limit=3 * size)
    assert cache.load({"model": "a"}, CPU, ["decoder"])
    fill(cache, "d")
    os.utime(cache._entry({"model": "d"}))
    assert held(cache) == ["d", "a", "c"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path):
    cache = Cache(tmp_path, limit=1000)
    cache.save({"model": "a"}, default_compiled().compiled_models)
    assert entries(tmp_path) == []


def test_a_model_whose_entry_was_removed_runs_on(directory):
    make()
    model = make()
    before = pixels(model, LATENT)
    assert Cache(directory).clear() == 1
    assert torch.equal(pixels(model, LATENT), before)


def test_clearing_leaves_files_of_others(directory):
    make()
    (directory / "mine.txt").write_text("mine")
    (directory / "folder").mkdir()
    assert Cache(directory).clear() == 1
    assert [path.name for path in entries(directory)] == ["folder", "mine.txt"]
    assert Cache(directory).clear() == 0


# Where nothing can be written


def test_a_folder_that_cannot_be_made_costs_one_warning(directory, compiled):
    directory.write_text("a file")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        first, second = make(), make()
    assert ["RBLN_VAE_CACHE" in str(each.message) for each in caught].count(True) == 1
    assert compiled == ["decoder", "decoder"]
    assert torch.equal(pixels(first, LATENT), pixels(second, LATENT))


AS_NOBODY = """
import json, os, warnings
import torch, rbln_vae
from vaes import make_vae, noise, pixels
vaes = [make_vae(seed=int(seed)) for seed in sys.argv[1:]]
options = {"target": "cpu", "dtype": "float32", "uses_encoder": False}
# Imports what compiling takes, which may be where nobody can read.
rbln_vae.RBLNAutoencoderKL.from_model(vaes[0], rbln_config=options)
os.setgid(65534); os.setuid(65534)
from rbln_vae.targets.base import get_target
compiled = []
CPU = get_target("cpu")
compile_module = CPU.compile_module
CPU.compile_module = lambda module, options: compiled.append(1) or compile_module(module, options)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    for vae in vaes:
        model = rbln_vae.RBLNAutoencoderKL.from_model(vae, rbln_config=options, cache=True)
        pixels(model, noise(1, 4, 5, 4))
print(json.dumps([len(compiled), sum("not kept" in str(each.message) for each in caught)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_read_and_not_written(monkeypatch):
    # Not in pytest's own directory, which any other run of pytest closes to other users.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        directory = Path(name, "cache")
        monkeypatch.setenv("RBLN_VAE_CACHE", str(directory))
        make()
        # The first model is there; the others are compiled, with one warning.
        assert in_a_process(AS_NOBODY, 0, 1, 2) == [2, 1]
        assert len(entries(directory)) == 1


# Processes


SLOWLY = """
import os, sys, time
import torch, rbln_vae
from pathlib import Path
from rbln_vae.artifact import Artifact
from vaes import make_vae, noise, pixels
started = Path(sys.argv[1])
save = Artifact.save
def slowly(self, path):
    save(self, path)
    {between}
Artifact.save = slowly
options = {{"target": "cpu", "dtype": "float32"}}
(started / str(os.getpid())).touch()
while len(list(started.iterdir())) < int(sys.argv[2]):
    time.sleep(0.01)
model = rbln_vae.RBLNAutoencoderKL.from_model(make_vae(), rbln_config=options, cache=True)
torch.save(pixels(model, noise(1, 4, 5, 4)), started.parent / f"{{os.getpid()}}.pt")
"""


def start(between: str, *arguments: object) -> subprocess.Popen[bytes]:
    script = f"import sys; sys.path[:0] = {PATHS!r}\n" + SLOWLY.format(between=between)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)])


@pytest.mark.slow
def test_two_processes_at_once_leave_one_whole_entry(directory, compiled, tmp_path):
    (tmp_path / "started").mkdir()
    both = [start("time.sleep(0.3)", tmp_path / "started", 2) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    (entry,) = entries(directory)
    assert {file.name for file in entry.iterdir()} == FILES
    found = pixels(make(uses_encoder=None), LATENT)
    assert compiled == []
    for process in both:
        assert torch.equal(torch.load(tmp_path / f"{process.pid}.pt"), found)


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_entry(directory, compiled, tmp_path):
    (tmp_path / "started").mkdir()
    killed = start("os.kill(os.getpid(), 9)", tmp_path / "started", 1)
    assert killed.wait(300) == -9
    (left,) = entries(directory)
    assert left.name.startswith(".") and left.name.endswith(".tmp")
    assert Cache(directory).entries() == []
    make()
    assert compiled == ["decoder"]
    assert left.exists()  # it might be one that is just written
    old = time.time() - 2 * caching._ABANDONED
    os.utime(left, (old, old))
    make(sample_size=32)
    assert not left.exists()
    assert len(entries(directory)) == 2


def test_an_error_while_saving_leaves_nothing(directory, compiled, monkeypatch):
    def full(self: Artifact, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Artifact, "save", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        make()
    assert entries(directory) == []
