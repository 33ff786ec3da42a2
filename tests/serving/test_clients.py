"""Clients other than diffusers' own get what they ask for, as their code asks for it.

Their requests are written down from SD.Next's `modules/vae/sd_vae_remote.py`, from
ComfyUI-HFRemoteVae and from ComfyUI-RemoteVAE, which send as `requests` does.
"""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers.utils.constants
import pytest
import requests
import torch
import yaml
from diffusers import FluxPipeline
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image
from services import make_app, raw, running
from torch import Tensor
from vaes import compile_vae, make_vae, noise

from rbln_vae import RBLNAutoencoderKL
from rbln_vae.serving.models import ServedModel

DEPLOY = Path(__file__).parents[2] / "deploy"
SCALING = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AS_TENSOR = {"Content-Type": "tensor/binary", "Accept": "tensor/binary"}


@pytest.fixture(scope="module")
def vae() -> RBLNAutoencoderKL:
    return compile_vae(make_vae(**SCALING))


@pytest.fixture(scope="module")
def server(vae: RBLNAutoencoderKL) -> Iterator[str]:
    with running(make_app(*(ServedModel(name, vae) for name in ("sd", "sdxl", "flux")))) as address:
        yield address


def post(address: str, tensor: Tensor, query: dict[str, Any], headers: dict[str, str]) -> Any:
    sent = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        **query,
    }
    answer = requests.post(address, params=sent, data=raw(tensor), headers=headers, timeout=60)
    assert answer.ok, answer.json()
    return answer


def tensor_of(answer: Any) -> Tensor:
    found = torch.frombuffer(bytearray(answer.content), dtype=DTYPES[answer.headers["dtype"]])
    return found.reshape(json.loads(answer.headers["shape"]))


def unscaled(latent: Tensor) -> Tensor:
    return latent / SCALING["scaling_factor"] + SCALING["shift_factor"]


@pytest.mark.parametrize("height_and_width", [{}, {"height": 12, "width": 16}], ids=["", "size"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nodes_for_comfyui_get_a_tensor(
    server: str, vae: RBLNAutoencoderKL, dtype: torch.dtype, height_and_width: dict[str, int]
) -> None:
    latent = noise(2, 4, 6, 8, dtype=dtype)
    query = {"do_scaling": False, "output_type": "pt", "partial_postprocess": False}
    answer = post(f"{server}/?model=sd", latent, {**query, **height_and_width}, AS_TENSOR)
    assert torch.equal(tensor_of(answer), vae.decode(latent).sample)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_sd_next_gets_a_tensor(server: str, vae: RBLNAutoencoderKL, packed: bool) -> None:
    latent = noise(1, 4, 6, 8, dtype=torch.bfloat16)
    query: dict[str, Any] = {"input_tensor_type": "binary", "output_tensor_type": "binary"}
    query |= {"output_type": "pt", "partial_postprocess": False, **SCALING}
    sent = latent
    if packed:
        sent = FluxPipeline._pack_latents(latent, 1, 4, 6, 8)
        query |= {"width": 16, "height": 12}
    answer = post(f"{server}/decode?model=flux", sent, query, AS_TENSOR)
    assert torch.equal(tensor_of(answer), vae.decode(unscaled(latent)).sample)


@pytest.mark.parametrize(("kind", "accept"), [("png", "image/png"), ("jpg", "image/jpeg")])
def test_sd_next_gets_a_picture(server: str, kind: str, accept: str) -> None:
    query: dict[str, Any] = {"input_tensor_type": "binary", "image_format": kind}
    query |= {
        "output_type": "pil",
        "scaling_factor": 0.5,
        "shift_factor": None,
    }  # `requests` leaves it out
    headers = {"Content-Type": "tensor/binary", "Accept": accept}
    answer = post(f"{server}/decode?model=sd", noise(1, 4, 6, 8), query, headers)
    assert answer.headers["content-type"] == accept
    assert Image.open(io.BytesIO(answer.content)).size == (16, 12)


def test_tensors_in_base64_are_refused(server: str) -> None:
    answer = requests.post(f"{server}/decode?shape=1&dtype=float32&input_tensor_type=base64",
                           timeout=60)  # fmt: skip
    assert answer.json()["code"] == "invalid_query"
    assert "input_tensor_type" in answer.json()["message"]


def endpoints() -> dict[str, str]:
    found = vars(diffusers.utils.constants).items()
    return {k: v for k, v in found if k.startswith(("DECODE_ENDPOINT", "ENCODE_ENDPOINT"))}


def rewritten(text: str) -> str:
    command = ["sed", "-f", str(DEPLOY / "clients.sed")]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", [name for name in endpoints() if "VIDEO" not in name])
@pytest.mark.parametrize("slash", ["", "/"])
def test_the_addresses_in_the_code_of_clients_are_replaced(
    server: str, vae: RBLNAutoencoderKL, name: str, slash: str
) -> None:
    line = f"    endpoint = '{endpoints()[name].rstrip('/')}{slash}',\n"
    found = rewritten(line)
    address = found.split("'")[1].replace("http://127.0.0.1:8000", server)
    assert address.startswith(server) and found.endswith("',\n")
    if name.startswith("DECODE"):
        latent = noise(1, 4, 4, 4)
        decoded = remote_decode(address, latent, do_scaling=False, output_type="pt",
                                return_type="pt")  # fmt: skip
        assert torch.equal(decoded, vae.decode(latent).sample)
    else:
        image = noise(1, 3, 8, 8).clamp(-1, 1)
        encoded = remote_encode(address, image)
        assert torch.equal(encoded, vae.encode(image).latent_dist.mode())


def test_other_lines_of_clients_stay() -> None:
    video = endpoints()["DECODE_ENDPOINT_HUNYUAN_VIDEO"]
    text = f"model = 'https://huggingface.co/x'\nurl = '{video}'\n"
    assert rewritten(text) == text


def test_the_compose_file_serves_what_the_image_can() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["vae"]
    assert service["healthcheck"]["test"][:2] == ["CMD", "/venv/bin/python"]
    compile(service["healthcheck"]["test"][3], "healthcheck", "exec")
    assert "/ready" in service["healthcheck"]["test"][3]
    arguments = dict(zip(service["command"][::2], service["command"][1::2], strict=True))
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > int(arguments["--grace"])
    # What the file keeps between starts is where the service looks for it.
    assert service["environment"]["RBLN_VAE_CACHE"] in [v.split(":")[1] for v in service["volumes"]]
