"""`RBLNVQModel`: the vector-quantised autoencoders of Kandinsky and aMUSEd."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import RBLNVQModelConfig
from ..graph.capture import replica
from .autoencoder import RBLNAutoencoderModel, check_tensor
from .autoencoder_kl import AutoencoderKLFamily, use_standard_attention
from .base import RunArguments
from .family import ENCODER
from .latents import LatentScaling

if TYPE_CHECKING:
    import numpy.typing as npt
    from diffusers.models.autoencoders.vae import DecoderOutput, VectorQuantizer
    from diffusers.models.autoencoders.vq_model import VQEncoderOutput
    from typing_extensions import Unpack

CODEBOOK = "quantize.embedding.weight"
"""The vectors that latents are quantised to, `(num_vq_embeddings, channels)`."""


class VQModelFamily(AutoencoderKLFamily):
    """`VQModel`: the MoVQ of Kandinsky 2 and 3, and the VQGAN of aMUSEd."""

    original_class_name = "VQModel"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        facts = super().facts(config)
        # The channels between quant_conv and post_quant_conv: what encode gives.
        return {**facts, "latent_channels": config.get("vq_embed_dim") or facts["latent_channels"]}

    def sample_size(self, config: Mapping[str, Any]) -> Any:
        # Checkpoints keep diffusers' default of 32, whatever the images of their pipelines are.
        return 512 if config.get("sample_size") in (None, 32) else config["sample_size"]

    def module(self, model: torch.nn.Module, part: str) -> torch.nn.Module:
        if part == ENCODER:
            return super().module(model, part)
        module = replica(_Decoder(model))
        use_standard_attention(module)
        return module

    def buffers(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {CODEBOOK: (config["num_vq_embeddings"], self.facts(config)["latent_channels"])}

    def latent_scaling(
        self, config: Mapping[str, Any], buffers: Mapping[str, Tensor]
    ) -> LatentScaling:
        """None: pipelines take latents as they are, although configurations have a factor."""
        return LatentScaling()


class RBLNVQModel(RBLNAutoencoderModel):
    """A compiled `VQModel`, which stands wherever that of diffusers stands.

    The *encoder* turns an image into a latent, the *decoder* a latent into an image. What is
    between them, the lookup in the codebook, is diffusers' own, in float32. Results keep the
    dtype and the device of the input.

    Example:
        >>> movq = RBLNVQModel.from_pretrained(
        ...     "kandinsky-community/kandinsky-2-2-decoder", subfolder="movq", export=True
        ... )  # doctest: +SKIP
        >>> image = movq.decode(latent, force_not_quantize=True)["sample"]  # doctest: +SKIP
    """

    config_class = RBLNVQModelConfig
    family = VQModelFamily()
    draws = False

    rbln_config: RBLNVQModelConfig

    def encode(
        self, x: Tensor, return_dict: bool = True, **arguments: Unpack[RunArguments]
    ) -> VQEncoderOutput | tuple[Tensor]:
        """Turn images into latents, which are not quantised.

        Args:
            x: Images `(N, in_channels, H, W)` in `[-1, 1]`, of any floating dtype and
                strides; or pictures `(N, H, W, in_channels)` of uint8. Of sides that are no
                multiple of the scale factor, the last rows or columns are left out.
            return_dict: Whether to return an output class (default) or a tuple.
            **arguments: `should_stop`, `progress` and `memory_limit`: see `RunArguments`.

        Returns:
            `VQEncoderOutput(latents=…)`, or `(latents,)`: `(N, latent_channels, H / f, W / f)`.

        Raises:
            ValueError: The shape or the device is wrong.
            TypeError: It is no tensor of floats or uint8.
            RBLNRuntimeError: The encoder was not compiled, or there are no runtimes.
            TimeoutError: The run took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> latents = movq.encode(image)["latents"]  # doctest: +SKIP
        """
        from diffusers.models.autoencoders.vq_model import VQEncoderOutput

        latents = self._encoded(x, **arguments)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        **arguments: Unpack[RunArguments],
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Turn latents into images.

        Args:
            h: Latents `(N, latent_channels, h, w)`, of any floating dtype and strides. With
                `force_not_quantize`, a model whose configuration has `lookup_from_codebook`
                takes indices of the codebook instead: integers of any shape.
            force_not_quantize: Whether to decode latents as they are. By default each is
                replaced by the nearest vector of the codebook. That takes 4 bytes for each
                latent cell and vector, which don't count against `memory_limit`.
            return_dict: Whether to return an output class (default) or a tuple.
            shape: `(N, h, w, latent_channels)` of the latents that indices stand for. By
                default none, which is right for latents.
            out: Where to write the images; as of `RBLNAutoencoderKL.decode`. By default the
                result is a new tensor.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `encode`.

        Returns:
            `DecoderOutput(sample=…, commit_loss=…)`, or `(sample, commit_loss)`: images `(N,
            out_channels, f * h, f * w)`, about in `[-1, 1]`; and the loss of quantising, a
            number, or zeros `(N,)` where nothing was quantised.

        Raises:
            ValueError: The shape or the device is wrong, of `h` or of `out`; or an index is
                outside of the codebook.
            TypeError: One is no floating tensor, or indices are no integers.
            RBLNRuntimeError: There are no runtimes.
            TimeoutError: The run took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> image = movq.decode(latents, force_not_quantize=True)["sample"]
            ... # doctest: +SKIP
        """
        latents, loss = h, None
        if force_not_quantize and self._config.get("lookup_from_codebook"):
            latents = self._looked_up(h, shape)
        else:
            check_tensor(h, "h", self.resolved_config.latent_channels)
        if not force_not_quantize:
            latents, loss = self._quantised(h)
        sample = self.decode_latents(latents, out=out, **arguments)
        if loss is None:
            loss = torch.zeros(h.shape[0], dtype=h.dtype, device=h.device)
        if not return_dict:
            return sample, loss
        # A process that does without has 0.1 GB less to load.
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=sample, commit_loss=loss)  # type: ignore[arg-type]

    def forward(
        self, sample: Tensor, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Encode images, quantise their latents and decode them again.

        Args:
            sample: Images, as `encode` takes them.
            return_dict: Whether to return an output class (default) or a tuple.

        Returns:
            As `decode`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError: As `encode`.
        """
        (latents,) = self.encode(sample, return_dict=False)
        return self.decode(latents, return_dict=return_dict)

    __call__ = forward

    @functools.cached_property
    def quantize(self) -> VectorQuantizer:
        """Diffusers' own module, which finds the nearest vectors of the codebook."""
        from diffusers.models.autoencoders.vae import VectorQuantizer

        codebook = self._compiled.buffers[CODEBOOK].float()
        with torch.device("meta"):  # it draws no vectors at random there
            quantizer = VectorQuantizer(len(codebook), codebook.shape[1], beta=0.25)
        quantizer.embedding.weight = torch.nn.Parameter(codebook, requires_grad=False)
        return quantizer.eval()

    def _quantised(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest vectors of the codebook, and the loss."""
        with torch.no_grad():
            latents, loss, _ = self.quantize(h.detach().to("cpu", torch.float32))
        return latents.to(h), loss.to(h)

    def _looked_up(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """The latents that indices of the codebook stand for."""
        size, channels = self._compiled.buffers[CODEBOOK].shape
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
            found = getattr(indices, "dtype", type(indices).__name__)
            raise TypeError(
                f"h must be a tensor of int64 or int32, and is {found}: this model decodes indices "
                "of its codebook (lookup_from_codebook). decode_latents decodes latents."
            )
        if shape is None or len(shape) != 4 or shape[3] != channels:
            raise ValueError(
                f"shape must be (N, h, w, {channels}) of the latents that the indices stand for, "
                f"and is {shape}."
            )
        if indices.numel() * channels != torch.Size(shape).numel():
            raise ValueError(
                f"h has {indices.numel()} indices, and shape={tuple(shape)} needs "
                f"{torch.Size(shape[:3]).numel()}."
            )
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise ValueError(
                f"h must hold indices of the codebook, 0 to {size - 1}, and holds "
                f"{int(indices.min())} to {int(indices.max())}."
            )
        entries: Any = self.quantize.get_codebook_entry
        latents: Tensor = entries(indices.cpu(), shape)
        return latents.to(indices.device, self.dtype)


class _Decoder(torch.nn.Module):
    """Latent to image, under the names that the weights have in the whole model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = vae.post_quant_conv
        self.spatial = vae.config.norm_type == "spatial"

    def forward(self, h: Tensor) -> Tensor:
        image: Tensor = self.decoder(self.post_quant_conv(h), h if self.spatial else None)
        return image
