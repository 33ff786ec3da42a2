"""The models of a service: how they are named, opened, and given their memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vaes import default_compiled, default_vae, noise

from rbln_vae.errors import RBLNTargetUnavailableError
from rbln_vae.serving.models import LONGEST_NAME, named_models, open_models
from rbln_vae.targets.base import get_target


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    default_compiled().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["a/sdxl"], {"sdxl": "a/sdxl"}),
        (["a/sdxl/"], {"sdxl": "a/sdxl/"}),
        (["flux=b"], {"flux": "b"}),
        (["a/sdxl", "flux=b", "x=c/d"], {"sdxl": "a/sdxl", "flux": "b", "x": "c/d"}),
        ([" a=x ", " b=y/z"], {"a": "x", "b": "y/z"}),
        # An equals sign in a path
        (["vae=lr=1"], {"vae": "lr=1"}),
        (["vae=runs/lr=1/vae"], {"vae": "runs/lr=1/vae"}),
        (["runs/lr=1/vae"], {"vae": "runs/lr=1/vae"}),
        (["/srv/lr=1"], {"lr=1": "/srv/lr=1"}),
        (["./lr=1"], {"lr=1": "./lr=1"}),
    ],
)
def test_a_model_has_the_name_that_is_given_or_that_of_its_directory(
    texts: list[str], named: dict[str, str]
) -> None:
    found = named_models(texts)
    assert found == named
    assert list(found) == list(named)


@pytest.mark.parametrize("text", ["", " ", "=b", "b=", "=", ".", "/"])
def test_an_empty_name_or_model_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"lacks a name or a model: expected NAME=MODEL"):
        named_models(["good=x", text])


@pytest.mark.parametrize("texts", [["a=x", "a=y"], ["x/a", "y/a"], ["x/a", "a=x/a"]])
def test_two_models_of_one_name_are_an_error_that_shows_both(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"two models are named 'a', x.* and .*; give each a name"):
        named_models(texts)


def test_a_name_that_no_request_could_say_is_an_error() -> None:
    assert named_models(["a" * LONGEST_NAME + "=x"])
    with pytest.raises(ValueError, match=f"expected at most {LONGEST_NAME}"):
        named_models(["a" * (LONGEST_NAME + 1) + "=x"])


def test_half_of_the_memory_of_the_device_is_for_runs_unless_told(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (8, 4, 16, 16)
    (model,), limit = open_models({"tiny": str(compiled)}, {}, None)
    assert limit == get_target("cpu").usable_memory("cpu") // 2
    fastest = model.memory_needed("decoder", shape)

    # On a device with less than twice of that, the batch is run in parts, within the half of it.
    memory = 2 * (fastest - 1)
    monkeypatch.setattr(type(get_target("cpu")), "usable_memory", lambda self, device: memory)
    (model,), limit = open_models({"tiny": str(compiled)}, {}, None)
    assert limit == fastest - 1
    assert model.memory_needed("decoder", shape) <= limit

    (model,), limit = open_models({"tiny": str(compiled)}, {}, fastest)
    assert limit == fastest
    assert model.memory_needed("decoder", shape) == fastest


def test_where_models_are_on_several_devices_the_smallest_counts(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default_vae().save_pretrained(tmp_path / "other")
    for name, memory in (("cpu", 3000), ("reference", 2000)):
        monkeypatch.setattr(
            type(get_target(name)), "usable_memory", lambda self, device, memory=memory: memory
        )
    _, limit = open_models({"a": str(compiled)}, {}, None)
    assert limit == 1500
    compiled_for_reference = tmp_path / "reference"
    models, _ = open_models({"b": str(tmp_path / "other")}, {"target": "reference"}, None)
    models[0]._vae.save_pretrained(compiled_for_reference)
    _, limit = open_models({"a": str(compiled), "b": str(compiled_for_reference)}, {}, None)
    assert limit == 1000


def test_a_model_may_be_a_pipeline(tmp_path: Path) -> None:
    default_vae().save_pretrained(tmp_path / "vae")
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (model,), _ = open_models({"sd": str(tmp_path)}, {"dtype": "float32"}, None)
    assert model.info.name == "sd"
    assert model.info.parts == ("encoder", "decoder")


@pytest.mark.parametrize("dtype", ["float16", "encoder=float32,decoder=float16"])
def test_a_model_is_opened_in_the_dtypes_that_were_asked_for(tmp_path: Path, dtype: str) -> None:
    default_vae().save_pretrained(tmp_path)
    (model,), _ = open_models({"vae": str(tmp_path)}, {"dtype": dtype}, None)
    assert model.info.dtype == dtype
    pictures = model.decode_images(noise(1, 4, 3, 2), lambda: False)
    assert pictures[1].tolist() == [True]


def test_a_target_that_can_not_run_here_is_named_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(get_target("cuda")), "unavailable_reason", lambda self: "no GPU")
    with pytest.raises(RBLNTargetUnavailableError, match="'cuda' can't run here: no GPU"):
        open_models({"nothing": "/there/is/no/such/model"}, {"target": "cuda"}, None)
