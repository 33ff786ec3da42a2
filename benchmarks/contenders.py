"""Those who run the model: this package and its peers, each behind the same two calls."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rbln_vae.sizes import Size

from . import models


class Contender(ABC):
    """One way to run a part of the model; lives in a process of its own."""

    def __init__(
        self, directory: Path, part: str, size: int | Size, threads: int, frames: int = 1
    ) -> None:
        self.directory, self.part, self.size, self.threads = directory, part, size, threads
        torch.set_num_threads(threads)
        self.input = models.make_input(directory, part, size, frames=frames)

    def convert(self) -> None:  # noqa: B027
        """Make a file of the model's own kind, where there is one.

        It is done in another process than the runs, whose memory it would raise. Most have
        nothing to convert.
        """

    @property
    def converted(self) -> Path:
        """Where that file is."""
        return self.directory / f"{type(self).__name__}-{self.part}-{self.size}"

    @abstractmethod
    def prepare(self) -> None:
        """Load it, or compile."""

    @abstractmethod
    def run(self) -> torch.Tensor:
        """One run on `self.input`."""

    def details(self) -> dict[str, float]:
        """What else is known of the latest run."""
        return {}


class Ours(Contender):
    dtype = "bfloat16"

    def convert(self) -> None:
        from rbln_vae import RBLNAutoencoder

        model = RBLNAutoencoder.from_pretrained(
            self.directory,
            export=True,
            rbln_target="cpu",
            rbln_dtype=self.dtype,
            rbln_sample_size=self.size,
            rbln_uses_encoder=self.part == "encode",
            rbln_create_runtimes=False,
        )
        model.save_pretrained(self.converted)

    def prepare(self) -> None:
        from rbln_vae import RBLNAutoencoder

        self.model = RBLNAutoencoder.from_pretrained(
            self.converted, rbln_num_threads=self.threads, rbln_timeout=3600
        )

    def run(self) -> torch.Tensor:
        return models.run(self.model, self.part, self.input)


class OursFloat32(Ours):
    dtype = "float32"


class OursProfiled(Ours):
    """Tells the time of its convolutions, too."""

    def prepare(self) -> None:
        from rbln_vae import RBLNAutoencoder

        self.model = RBLNAutoencoder.from_pretrained(
            self.converted,
            rbln_num_threads=self.threads,
            rbln_timeout=3600,
            rbln_activate_profiler=True,
        )

    def details(self) -> dict[str, float]:
        steps = self.model.profile().runs[-1].steps
        return {"convolutions": sum(s.seconds for s in steps if s.kind in ("Conv2d", "Winograd"))}


class OursTiling(OursProfiled):
    def prepare(self) -> None:
        super().prepare()
        self.model.enable_tiling()


class OursPictures(Ours):
    """Decodes to uint8 pictures."""

    def run(self) -> torch.Tensor:
        return self.model.decode_images(self.input)


class OursProcessed(Ours):
    """Decodes to floats, of which diffusers' image processor makes the same pictures."""

    def run(self) -> torch.Tensor:
        from diffusers.image_processor import VaeImageProcessor

        images = VaeImageProcessor().postprocess(super().run(), output_type="pil")
        return torch.stack([torch.from_numpy(np.asarray(image)) for image in images])


class Diffusers(Contender):
    dtype = torch.bfloat16

    def prepare(self) -> None:
        self.model = models.load(self.directory, torch_dtype=self.dtype).eval()
        for weight in self.model.parameters():
            if weight.dim() >= 4:
                weight.data = _channels_last(weight.data)
        self.function: Callable[[torch.Tensor], torch.Tensor] = functools.partial(
            models.run, self.model, self.part
        )

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        return self.function(_channels_last(self.input.to(self.dtype)))


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """In the order of memory that is fastest, with and without an axis of frames."""
    three = tensor.dim() == 5
    return tensor.contiguous(memory_format=torch.channels_last_3d if three else torch.channels_last)


class DiffusersFloat32(Diffusers):
    dtype = torch.float32


class DiffusersTiled(Diffusers):
    def prepare(self) -> None:
        super().prepare()
        self.model.enable_tiling()


class Compiled(Diffusers):
    def prepare(self) -> None:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        super().prepare()
        self.function = torch.compile(self.function)


class CompiledFloat32(Compiled):
    dtype = torch.float32


class OpenVino(Contender):
    precision = "bf16"

    def convert(self) -> None:
        import openvino

        model = models.load(self.directory).eval()
        # The values of the example don't matter, and a small one spares memory.
        example = models.make_input(self.directory, self.part, 64)
        graph = openvino.convert_model(_Part(model, self.part), example_input=example)
        graph.reshape([*self.input.shape])
        openvino.save_model(graph, self.converted / "model.xml", compress_to_fp16=False)

    def prepare(self) -> None:
        import openvino

        self.compiled = openvino.Core().compile_model(
            self.converted / "model.xml",
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": self.precision,
                "INFERENCE_NUM_THREADS": self.threads,
                "PERFORMANCE_HINT": "LATENCY",
            },
        )

    def run(self) -> torch.Tensor:
        result = self.compiled(self.input.numpy())[0]
        return torch.from_numpy(result)


class OpenVinoFloat32(OpenVino):
    precision = "f32"


class _Part(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, part: str) -> None:
        super().__init__()
        self.model, self.part = model, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.part == "encode":
            return self.model.quant_conv(self.model.encoder(x))
        return self.model.decode(x, return_dict=False)[0]


CONTENDERS: dict[str, type[Contender]] = {
    "rbln-vae bf16": Ours,
    "rbln-vae profiled bf16": OursProfiled,
    "rbln-vae tiling bf16": OursTiling,
    "rbln-vae pictures bf16": OursPictures,
    "rbln-vae processed bf16": OursProcessed,
    "rbln-vae f32": OursFloat32,
    "OpenVINO bf16": OpenVino,
    "OpenVINO f32": OpenVinoFloat32,
    "diffusers bf16": Diffusers,
    "diffusers f32": DiffusersFloat32,
    "diffusers tiled bf16": DiffusersTiled,
    "torch.compile bf16": Compiled,
    "torch.compile f32": CompiledFloat32,
}


def usual(model: str = "sd") -> list[str]:
    """What the benchmark of speed compares: peers in bfloat16 only where something multiplies it.

    Elsewhere diffusers takes 8.5 times as long in it as in float32. Models other than Stable
    Diffusion's are compared with diffusers alone.
    """
    from rbln_vae.targets.cpu.kernels import best_dtype

    peers = ["OpenVINO", "diffusers", "torch.compile"] if model == "sd" else ["diffusers"]
    names = ["rbln-vae bf16"]
    if best_dtype() == "bfloat16":
        names += [f"{peer} bf16" for peer in peers]
        names += ["diffusers tiled bf16"] if model == "sd" else []
    return [*names, "rbln-vae f32", *(f"{peer} f32" for peer in peers)]
