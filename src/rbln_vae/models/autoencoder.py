"""What every compiled autoencoder does with images and latents, whatever its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import RBLNRuntimeError
from ..targets.watch import ShouldStop
from .base import RBLNModel
from .family import DECODER, ENCODER

if TYPE_CHECKING:
    import numpy.typing as npt
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


class RBLNAutoencoderModel(RBLNModel):
    """A compiled autoencoder: images to latents, and latents to images.

    A class for each of diffusers' adds `encode`, `decode` and `forward` with the arguments and
    results of diffusers.
    """

    frames: ClassVar[bool] = False
    """Whether images and latents have an axis of frames, `(N, C, 1, H, W)`; else `(N, C, H, W)`."""
    draws: ClassVar[bool] = True
    """Whether the encoder gives a distribution of latents; else it gives the latents."""
    clamps: ClassVar[bool] = False
    """Whether pixels are limited to `[-1, 1]`, as some classes of diffusers do."""

    def encode_images(
        self, x: Tensor, *, should_stop: ShouldStop | None = None
    ) -> DiagonalGaussianDistribution | Tensor:
        """Encode images, in the same way for every class.

        Args:
            x: Images `(N, in_channels, H, W)`, without an axis of frames.
            should_stop: As of `encode`. By default the run is not stopped.

        Returns:
            The distribution of the latents `(N, latent_channels, h, w)`; the latents themselves
            if `draws` is `False`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `encode`.

        Example:
            >>> latent = vae.encode_images(image).mode()  # doctest: +SKIP
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        encoded = self._encoded(x, should_stop)
        return DiagonalGaussianDistribution(encoded) if self.draws else encoded

    def decode_latents(
        self,
        z: Tensor,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Tensor:
        """Decode latents, in the same way for every class.

        Args:
            z: Latents `(N, latent_channels, h, w)`, without an axis of frames.
            out: As of `decode`. By default the result is a new tensor.
            should_stop: As of `decode`. By default the run is not stopped.

        Returns:
            Images `(N, out_channels, H, W)`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `decode`.

        Example:
            >>> image = vae.decode_latents(latent)  # doctest: +SKIP
        """
        check_tensor(z, "z", self.resolved_config.latent_channels)
        image_shape = self.resolved_config.image_shape(tuple(z.shape))
        to = None if out is None else writable(out, image_shape)
        sample = self._run(DECODER, z, to, should_stop)
        return sample.clamp_(-1, 1) if self.clamps else sample

    def _encoded(self, x: Tensor, should_stop: ShouldStop | None) -> Tensor:
        """The result of the encoder: moments if it gives a distribution, else latents."""
        if not self.resolved_config.uses_encoder:
            raise RBLNRuntimeError(
                "This model has a decoder only (uses_encoder=False), so it can't encode. Compile "
                "it again with rbln_uses_encoder=True."
            )
        check_tensor(x, "x", self.resolved_config.in_channels)
        size, factor = (x.shape[2], x.shape[3]), self.resolved_config.vae_scale_factor
        self.family.check_image_size(size, factor, self.config)
        return self._run(ENCODER, x, should_stop=should_stop)

    # What pipelines and their users read, besides the members of every model

    use_tiling = use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Run each image in the least memory that it can; the pixels stay the same.

        Nothing is tiled: the target `cpu` computes some of the image twice instead of
        keeping all of it. A decode of 512² took 43% more time by that, one of 2048² 30%.
        """
        self.use_tiling = use_tiling
        self._save_memory()

    def disable_tiling(self) -> None:
        """Be as fast as `memory_limit` allows again."""
        self.use_tiling = False
        self._save_memory()

    def enable_slicing(self) -> None:
        """Run the images of a batch one by one; the pixels stay the same."""
        self.use_slicing = True
        self._save_memory()

    def disable_slicing(self) -> None:
        """Run batches together again, as far as `memory_limit` allows."""
        self.use_slicing = False
        self._save_memory()

    def _save_memory(self) -> None:
        for runtime in self._runtimes.values():
            runtime.save_memory(slicing=self.use_slicing, tiling=self.use_tiling)


def check_tensor(tensor: Tensor, name: str, channels: int, *, frames: bool = False) -> None:
    """Raise unless a tensor can be the input of a model.

    Args:
        tensor: The input of the caller.
        name: The name of the argument, for messages.
        channels: The channels that it must have.
        frames: Whether it must have an axis of frames, of length 1, after the channels. By
            default it must have none.

    Raises:
        TypeError: It is no floating tensor.
        ValueError: It has another shape, or no data.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch tensor, and is a {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be a floating tensor, and is {tensor.dtype}. Convert it, for images "
            "in 0…255 by x / 127.5 - 1."
        )
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"{name} must be a dense tensor with data, and is {tensor.layout} on {tensor.device}."
        )
    shape = tuple(tensor.shape)
    axes = 5 if frames else 4
    if len(shape) == axes and shape[1] == channels and 0 not in shape:
        if frames and shape[2] != 1:
            raise ValueError(
                f"{name} has {shape[2]} frames, and this model runs images of one frame, (N, "
                f"{channels}, 1, H, W). Use diffusers' own class for videos."
            )
        return
    wanted = f"(N, {channels}, 1, H, W)" if frames else f"(N, {channels}, H, W)"
    advice = {
        (4, 5): f" {name}.unsqueeze(2) adds the axis of frames.",
        (5, 4): f" {name}.squeeze(2) removes an axis of one frame.",
    }.get((len(shape), axes), "")
    raise ValueError(
        f"{name} must have the shape {wanted} with no empty axis, and has {shape}.{advice}"
    )


def writable(out: Tensor | npt.NDArray[Any], shape: tuple[int, ...]) -> Tensor:
    """The tensor that a caller gave to write to, or that shares the memory of an array."""
    if not isinstance(out, Tensor):
        import numpy as np

        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a tensor or an array, and is a {type(out).__name__}.")
        if not out.flags.writeable:
            raise ValueError("out can't be written to. Open a memory map with mode 'r+' or 'w+'.")
        if out.dtype.kind != "f" or out.dtype.itemsize > 4:
            raise TypeError(f"out must hold float32 or float16, and holds {out.dtype}.")
        out = torch.from_numpy(out)
    if out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"out must hold float32, float16 or bfloat16, and holds {out.dtype}.")
    if tuple(out.shape) != shape or out.device.type != "cpu":
        raise ValueError(
            f"out must have the shape {shape} and be on the CPU, and has {tuple(out.shape)} on "
            f"{out.device}."
        )
    return out.detach()
