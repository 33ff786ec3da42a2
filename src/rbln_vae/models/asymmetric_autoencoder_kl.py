"""`RBLNAsymmetricAutoencoderKL`: autoencoders with a larger decoder, for inpainting.

The decoder runs with or without a condition: an image, and a mask of what is new in it. With
the condition it is a part of its own, whose input holds the latents, the image and the mask in
one image of full size.
"""

from __future__ import annotations

import functools
import sys
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import RBLNAsymmetricAutoencoderKLConfig
from ..graph.capture import replica
from ..targets.base import OnRows
from .autoencoder import RBLNAutoencoderModel, check_tensor, decoded, writable
from .autoencoder_kl import AutoencoderKLFamily, use_standard_attention
from .base import RunArguments
from .family import CONDITIONED_DECODER

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from typing_extensions import Unpack


class AsymmetricAutoencoderKLFamily(AutoencoderKLFamily):
    """`AsymmetricAutoencoderKL`: inpainting with Stable Diffusion."""

    original_class_name = "AsymmetricAutoencoderKL"

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        widths = config["up_block_out_channels"]
        facts = super().facts(
            {**config, "block_out_channels": config.get("down_block_out_channels")}
        )
        return {
            **facts,
            "decoder_scale_factor": 2 ** (len(widths) - 1),
            "condition_channels": facts["out_channels"] + 1 if _takes_condition(widths) else 0,
        }

    def module(self, model: nn.Module, part: str) -> nn.Module:
        if part != CONDITIONED_DECODER:
            return super().module(model, part)
        module = replica(_ConditionedDecoder(model))
        use_standard_attention(module)
        return module


def _takes_condition(widths: Sequence[int]) -> bool:
    """Whether the features of the condition have the shapes that the decoder meets.

    Diffusers' own decoder can't take a condition otherwise.
    """
    features = [min(widths[0] * 2**level, widths[-1]) for level in range(4)]
    given = set(zip([*features, widths[-1]], (1, 1, 2, 4, 8), strict=True))
    levels = len(widths)
    met = {(widths[-1], 2 ** (levels - 1)), (widths[0], 1)}
    met |= {(widths[levels - 1 - i], 2 ** (levels - 2 - i)) for i in range(levels - 1)}
    return met <= given


@functools.cache
def _shown_class(compiled: type, original: type) -> type:
    """A subclass of a compiled model's class that is one of the original class, too.

    It has no bases of the original: a model that were also a `torch.nn.Module` would be moved
    and offloaded by pipelines, and loaded as one.
    """

    class Shown(ABCMeta):
        def mro(cls) -> list[type]:
            *ours, last = super().mro()
            return [*ours, original, last]

    return Shown(compiled.__name__, (compiled,), {"__module__": compiled.__module__})


class RBLNAsymmetricAutoencoderKL(RBLNAutoencoderModel):
    """A compiled `AsymmetricAutoencoderKL`, which stands wherever that of diffusers stands.

    `isinstance` sees it as an instance of diffusers' class, because inpainting pipelines pass
    image and mask only to those. Results keep the dtype and the device of the input.

    Example:
        >>> vae = RBLNAsymmetricAutoencoderKL.from_pretrained(
        ...     "cross-attention/asymmetric-autoencoder-kl-x-2", export=True
        ... )  # doctest: +SKIP
        >>> image = vae.decode(latent, image=image, mask=mask).sample  # doctest: +SKIP
    """

    config_class = RBLNAsymmetricAutoencoderKLConfig
    family = AsymmetricAutoencoderKLFamily()

    rbln_config: RBLNAsymmetricAutoencoderKLConfig

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What `isinstance` sees; pipelines record its name when they are saved."""
        # Nobody can ask for a class whose module isn't imported.
        module = sys.modules.get("diffusers.models.autoencoders.autoencoder_asym_kl")
        return _shown_class(type(self), module.AsymmetricAutoencoderKL) if module else type(self)

    def encode(
        self, x: Tensor, return_dict: bool = True, **arguments: Unpack[RunArguments]
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Turn images into distributions of latents; see `RBLNAutoencoderKL.encode`.

        Args:
            x: Images `(N, in_channels, H, W)` in `[-1, 1]`, or pictures `(N, H, W,
                in_channels)` of uint8.
            return_dict: Whether to return an output class (default) or a tuple.
            **arguments: As of `RBLNAutoencoderKL.encode`.

        Returns:
            `AutoencoderKLOutput(latent_dist=…)`, or `(latent_dist,)`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As
                `RBLNAutoencoderKL.encode`.

        Example:
            >>> latent = vae.encode(image).latent_dist.sample()  # doctest: +SKIP
        """
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        posterior: Any = self.encode_images(x, **arguments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self,
        z: Tensor,
        generator: torch.Generator | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        return_dict: bool = True,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        **arguments: Unpack[RunArguments],
    ) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into images, given what they show outside a mask.

        Args:
            z: Unscaled latents `(N, latent_channels, h, w)`.
            generator: Accepted, and draws nothing.
            image: What the images show where the mask is 0, `(N or 1, out_channels, H, W)` in
                `[-1, 1]`. By default nothing is given.
            mask: 1 where the images are new and 0 elsewhere, `(N or 1, 1, H, W)`. By default
                nothing is given. Without both, the images are decoded from the latents alone.
            return_dict: Whether to return an output class (default) or a tuple.
            out: As of `RBLNAutoencoderKL.decode`. By default the result is a new tensor.
            **arguments: As of `RBLNAutoencoderKL.decode`.

        Returns:
            `DecoderOutput(sample=…)`, or `(sample,)`: images `(N, out_channels, H, W)`.

        Raises:
            ValueError: A shape or a device is wrong, or the model takes no condition.
            TypeError: One is no floating tensor.
            RBLNRuntimeError, TimeoutError, RBLNCancelledError, MemoryError: As
                `RBLNAutoencoderKL.decode`.

        Example:
            >>> image = vae.decode(latent, image=image, mask=mask).sample  # doctest: +SKIP
        """
        if image is None or mask is None:
            sample = self.decode_latents(z, out=out, **arguments)
        else:
            inputs = self._with_condition(z, image, mask)
            shape = self.resolved_config.image_shape(tuple(z.shape))
            to = None if out is None else writable(out, shape)
            sample = self._run(CONDITIONED_DECODER, inputs, to, **arguments)
        return decoded(sample, return_dict)

    def decode_images(
        self,
        z: Tensor,
        *,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        out: Tensor | npt.NDArray[np.uint8] | None = None,
        on_rows: OnRows | None = None,
        finite: Tensor | None = None,
        **arguments: Unpack[RunArguments],
    ) -> Tensor:
        """Decode latents to uint8 pictures, given what they show outside a mask.

        Args:
            z: Unscaled latents `(N, latent_channels, h, w)`.
            image: As of `decode`. By default nothing is given.
            mask: As of `decode`. By default nothing is given.
            out: As of `RBLNAutoencoderKL.decode_images`, and so are the others.
            on_rows: By default nothing is called.
            finite: By default a warning says if a value was not finite.
            **arguments: `should_stop`, `progress` and `memory_limit`.

        Returns:
            `out` as a tensor, or a new tensor: uint8 `(N, H, W, out_channels)`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `decode`.

        Example:
            >>> pixels = vae.decode_images(latent, image=image, mask=mask)  # doctest: +SKIP
        """
        if image is None or mask is None:
            return super().decode_images(z, out=out, on_rows=on_rows, finite=finite, **arguments)
        inputs = self._with_condition(z, image, mask)
        shape = self.resolved_config.image_shape(tuple(z.shape))
        return self._pictures(
            CONDITIONED_DECODER, inputs, shape, False, out, on_rows, finite, **arguments
        )

    def _with_condition(self, z: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """The input of the conditioned decoder."""
        resolved = self.resolved_config
        if not resolved.condition_channels:
            raise ValueError(
                "This model takes no image and mask: the features of its condition don't have the "
                "shapes of its decoder, so diffusers can't run it with them either."
            )
        check_tensor(z, "z", resolved.latent_channels)
        shape = resolved.image_shape(tuple(z.shape))
        for name, given, channels in (("image", image, shape[1]), ("mask", mask, 1)):
            check_tensor(given, name, channels)
            if given.shape[0] not in (1, shape[0]) or given.shape[2:] != shape[2:]:
                raise ValueError(
                    f"{name} must have the shape ({shape[0]} or 1, {channels}, {shape[2]}, "
                    f"{shape[3]}) for these latents, and has {tuple(given.shape)}."
                )
        cells = F.interpolate(z, scale_factor=resolved.decoder_scale_factor, mode="nearest")
        conditions = torch.cat([(1 - mask) * image, mask.to(image.dtype)], dim=1).to(z)
        return torch.cat([cells, conditions.expand(shape[0], -1, -1, -1)], dim=1)

    def forward(
        self,
        sample: Tensor,
        mask: Tensor | None = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode images and decode them again.

        Args:
            sample: Images, as `encode` takes them.
            mask: As of `decode`, whose image is the sample. By default nothing is given.
            sample_posterior: Whether to draw the latent, or to take the mode (default).
            return_dict: Whether to return an output class (default) or a tuple.
            generator: Where to draw from. By default torch's own generator.

        Returns:
            As `decode`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError: As `encode` and `decode`.
        """
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, generator, sample, mask, return_dict)

    __call__ = forward


class _ConditionedDecoder(nn.Module):
    """From latents, masked image and mask in one image of full size to the decoded image.

    The channels of the latent come first, and are the same in all pixels of a cell.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = vae.post_quant_conv
        widths = vae.config.up_block_out_channels
        doublings = len(widths) - 1
        latent = vae.config.latent_channels
        mask = latent + vae.config.out_channels
        self.latents = _Channels(range(latent))
        self.image = _Channels(range(latent, mask))
        self.mask = _Channels([mask])
        self.latent_cells = nn.ModuleList(_Corners(latent) for _ in range(doublings))
        self.mask_cells = nn.ModuleList(_Corners(1) for _ in range(doublings))
        self.wide = nn.ModuleDict({str(width): _Channels([0] * width) for width in set(widths)})

    def forward(self, x: Tensor) -> Tensor:
        decoder: Any = self.decoder
        z = self.latents(x)
        for cells in self.latent_cells:
            z = cells(z)
        masks = [self.mask(x)]
        for cells in self.mask_cells:
            masks.append(cells(masks[-1]))
        features = decoder.condition_encoder(self.image(x))
        sample = decoder.mid_block(decoder.conv_in(self.post_quant_conv(z)))
        for block in decoder.up_blocks:
            sample = block(self._mixed(sample, features, masks))
        sample = self._mixed(sample, features, masks)
        image: Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(sample)))
        return image

    def _mixed(self, sample: Tensor, features: Mapping[str, Tensor], masks: Any) -> Tensor:
        """The sample where the mask is 1, and the features of the condition where it is 0."""
        feature = features[str(tuple(sample.shape))]
        mask = next(mask for mask in masks if mask.shape[2:] == sample.shape[2:])
        mask = self.wide[str(sample.shape[1])](mask)
        mixed: Tensor = (sample + feature * -1.0) * mask + feature
        return mixed


class _Channels(nn.Module):
    """Some channels of an image, each as often as it is named."""

    order: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(list(channels)))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.order)


class _Corners(_Channels):
    """The first pixel of each cell of 2x2, which nearest-neighbour halving takes."""

    def __init__(self, channels: int) -> None:
        super().__init__(range(0, 4 * channels, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pixel_unshuffle(x, 2))
