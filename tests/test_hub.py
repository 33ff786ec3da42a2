"""How models are looked for: what is asked of the hub, how often, and how long."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub import Hub, fill_cache, read_files, serve_hub
from huggingface_hub import constants
from typer.testing import CliRunner
from vaes import assert_same_model, default_vae, make_vae, save_vae

from rbln_vae import RBLNAutoencoderKL
from rbln_vae import hub as looking
from rbln_vae.cli.app import app

FILE = "diffusion_pytorch_model.safetensors"
CPU = {"target": "cpu", "dtype": "float32"}
PATHS = (
    "./none",
    "../none",
    "/none",
    "~/none",
    ".none",
    "none/",
    "none.safetensors",
    "some/none.safetensors",
    "some/where/none",
    "some\\none",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_vae(default_vae(), tmp_path_factory.mktemp("original"))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    with serve_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def nobody(tmp_path, monkeypatch) -> Iterator[None]:
    """The address of a hub at which nothing listens, and an empty cache."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # but it doesn't listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.fixture
def logged(caplog) -> Iterator[Callable[[], list[str]]]:
    """What `huggingface_hub` has logged, which it keeps from the root logger."""
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(caplog.handler)
    yield lambda: [each.getMessage() for each in caplog.records if each.name.startswith("hugging")]
    logger.removeHandler(caplog.handler)


def load(name, export=True, **options) -> RBLNAutoencoderKL:
    return RBLNAutoencoderKL.from_pretrained(name, export=export, rbln_config=CPU, **options)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(each) for each in arguments], standalone_mode=False)


# Names that can only be paths


@pytest.mark.parametrize("name", PATHS)
def test_a_name_that_can_only_be_a_path_is_not_asked_for(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for export in (True, False, None):
        with pytest.raises(OSError, match=r"There is no (directory|file)"):
            load(name, export)
    assert isinstance(run("compile", name, tmp_path / "out").exception, OSError)
    assert hub.requests == []


def test_what_lies_here_is_not_asked_for(hub, tmp_path, monkeypatch, original):
    monkeypatch.chdir(original.parent)
    assert_same_model(load(original.name), default_vae())
    assert run("compile", original.name, tmp_path / "out").exception is None
    assert hub.requests == []


# Single files


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A model whose weights alone tell what it is."""
    path = tmp_path_factory.mktemp("weights")
    vae = make_vae(block_out_channels=(32, 64), norm_num_groups=32)
    return save_vae(vae, path)


def test_a_file_that_lies_here_needs_no_hub(hub, weights):
    load(str(weights / FILE))
    assert hub.requests == []


@pytest.mark.parametrize("action", ["blob", "resolve"])
def test_the_address_of_a_file_on_the_hub_is_loaded(hub, weights, action):
    hub.add("me/vae", weights, branch="dev")
    load(f"https://huggingface.co/me/vae/{action}/dev/{FILE}", kind="sd")
    assert hub.downloads == [f"me/vae/dev/{FILE}"]


def test_an_address_elsewhere_is_refused(hub):
    with pytest.raises(OSError, match=r"is no address of a file on the hub.*Download it"):
        load(f"https://example.com/{FILE}")
    assert hub.requests == []


def test_a_kind_of_a_model_with_a_configuration_is_refused(hub, original):
    hub.add("me/vae", original)
    with pytest.raises(ValueError, match=r"kind='sd' is for \.safetensors files, and me/vae"):
        load("me/vae", kind="sd")


# Models that aren't there


@pytest.mark.parametrize("export", [True, False, None])
def test_of_a_model_that_does_not_exist_the_hub_is_asked_once(hub, export):
    with pytest.raises(OSError, match=r"'me/none' is neither .* nor a model on the hub"):
        load("me/none", export)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("command", ["compile", "reconstruct"])
def test_commands_ask_once_too(hub, tmp_path, command):
    (tmp_path / "image.png").touch()
    arguments = {
        "compile": ("me/none", tmp_path / "out"),
        "reconstruct": (tmp_path / "image.png", "--model", "me/none"),
    }
    with pytest.raises(OSError, match=r"'me/none' is neither .* nor a model on the hub"):
        raise run(command, *arguments[command]).exception
    assert len(hub.requests) == 1


def test_a_revision_that_does_not_exist_is_named(hub, original):
    hub.add("me/vae", original)
    with pytest.raises(OSError, match="'me/vae' on the hub has no revision 'none'"):
        load("me/vae", revision="none")
    assert len(hub.requests) == 1


# Hubs that don't answer


def test_where_nothing_listens_there_is_one_try_and_no_warning(nobody, tmp_path, logged):
    with pytest.raises(
        OSError, match=r"'me/vae' is neither .* cache.*can't be reached \(.*refused"
    ):
        load("me/vae")
    result = run("compile", "me/vae", tmp_path / "out")
    assert "can't be reached" in str(result.exception)
    assert logged() == []


def test_a_hub_that_says_nothing_is_waited_for_once(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(looking, "_PATIENCE", 0.2)
    hub.silent = True
    result = run("compile", "me/vae", tmp_path / "out")
    assert "no answer in 0.2 seconds; HF_HUB_ETAG_TIMEOUT gives it more" in str(result.exception)
    assert len(hub.requests) == 1


def test_the_wait_is_ten_seconds_at_most_unless_the_user_says_otherwise(hub, monkeypatch):
    assert looking._PATIENCE < 10
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.1")
    hub.silent = True
    with pytest.raises(OSError, match=r"no answer in 0\.1 seconds"):
        load("me/vae")


def test_what_is_in_the_cache_is_loaded_without_the_hub(nobody, tmp_path, original, logged):
    fill_cache(tmp_path / "cache", "me/vae", read_files(original))
    assert_same_model(load("me/vae"), default_vae())
    assert run("compile", "me/vae", tmp_path / "out").exception is None
    assert logged() == []


def test_a_silent_hub_is_waited_for_once_before_the_cache_is_used(
    hub, monkeypatch, tmp_path, original
):
    fill_cache(tmp_path / "cache", "me/vae", read_files(original))
    monkeypatch.setattr(looking, "_PATIENCE", 0.2)
    hub.silent = True
    assert run("compile", "me/vae", tmp_path / "out").exception is None
    assert len(hub.requests) == 1


def test_a_new_download_needs_the_hub(nobody, tmp_path, original):
    fill_cache(tmp_path / "cache", "me/vae", read_files(original))
    with pytest.raises(OSError, match="can't be reached"):
        load("me/vae", force_download=True)


def test_a_model_that_was_removed_from_the_hub_is_loaded_from_the_cache(hub, original):
    hub.add("me/vae", original)
    load("me/vae")
    hub.repositories.clear()
    assert_same_model(load("me/vae"), default_vae())


def test_a_busy_hub_is_asked_again(hub, original):
    hub.add("me/vae", original)
    hub.busy = 3
    assert_same_model(load("me/vae"), default_vae())
