"""`RBLNAutoencoderKLTemporalDecoder`: Stable Video Diffusion, whose decoder runs clips.

A *clip* is the frames of one call. The decoder's norms over time have the statistics of all of
them, so a clip is one run, whose batch are its frames, and no frame is done before the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import RBLNAutoencoderKLTemporalDecoderConfig, RBLNModelConfig, reject_unknown
from ..errors import RBLNCompileError
from ..targets.base import OnRows
from ..targets.watch import PER_IMAGE, Progress
from .autoencoder import RBLNAutoencoderModel, check_tensor, decoded, writable
from .autoencoder_kl import AutoencoderKLFamily, use_standard_attention
from .base import RunArguments
from .family import DECODER, ENCODER
from .networks import converted

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from typing_extensions import Unpack


class AutoencoderKLTemporalDecoderFamily(AutoencoderKLFamily):
    """`AutoencoderKLTemporalDecoder`: Stable Video Diffusion."""

    original_class_name = "AutoencoderKLTemporalDecoder"
    clip_frames = 14

    def module(self, model: nn.Module, part: str) -> nn.Module:
        if part == ENCODER:
            return super().module(model, part)
        module = converted(_Decoder(model), {"SpatioTemporalResBlock": _SpatioTemporalBlock})
        use_standard_attention(module)
        return module


class RBLNAutoencoderKLTemporalDecoder(RBLNAutoencoderModel):
    """A compiled `AutoencoderKLTemporalDecoder`, which stands wherever that of diffusers stands.

    It encodes images, and decodes the frames of clips. Results keep the dtype and the device of
    what came in.

    Example:
        >>> vae = RBLNAutoencoderKLTemporalDecoder.from_pretrained(
        ...     "stabilityai/stable-video-diffusion-img2vid", subfolder="vae", export=True
        ... )  # doctest: +SKIP
        >>> frames = vae.decode(latents, num_frames=14).sample  # doctest: +SKIP
    """

    config_class = RBLNAutoencoderKLTemporalDecoderConfig
    family = AutoencoderKLTemporalDecoderFamily()

    rbln_config: RBLNAutoencoderKLTemporalDecoderConfig

    def encode(
        self, x: Tensor, return_dict: bool = True, **arguments: Unpack[RunArguments]
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Turn images into distributions of latents; see `RBLNAutoencoderKL.encode`.

        Args:
            x: Images `(N, in_channels, H, W)` in `[-1, 1]`, or pictures `(N, H, W,
                in_channels)` of uint8.
            return_dict: Whether to return an output class (default) or a tuple.
            **arguments: `should_stop`, `progress` and `memory_limit`: see `RunArguments`.

        Returns:
            `AutoencoderKLOutput(latent_dist=…)`, or `(latent_dist,)`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, RBLNCancelledError,
                MemoryError: As `RBLNAutoencoderKL.encode`.

        Example:
            >>> latent = vae.encode(image).latent_dist.mode()  # doctest: +SKIP
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        posterior = self.encode_images(x, **arguments)
        assert isinstance(posterior, DiagonalGaussianDistribution)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self,
        z: Tensor,
        num_frames: int,
        return_dict: bool = True,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        **arguments: Unpack[RunArguments],
    ) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into the frames of clips.

        Args:
            z: Unscaled latents `(clips * num_frames, latent_channels, h, w)`, clip by clip, of
                any floating dtype and strides.
            num_frames: Frames of a clip, any number. Clips run one after the other.
            return_dict: Whether to return an output class (default) or a tuple.
            out: Where to write the frames, as of `RBLNAutoencoderKL.decode`. By default the
                result is a new tensor.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `encode`.

        Returns:
            `DecoderOutput(sample=…)`, or `(sample,)`: frames `(clips * num_frames, out_channels,
            f * h, f * w)`, about in `[-1, 1]`.

        Raises:
            ValueError: The shape or the device is wrong, of `z` or of `out`; or the frames don't
                make whole clips.
            TypeError: One is no floating tensor, or a name is unknown.
            RBLNRuntimeError: There are no runtimes.
            TimeoutError: The run of a clip took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> frames = vae.decode(latents, num_frames=14).sample  # doctest: +SKIP
        """
        return decoded(self._decoded(z, num_frames, out, **arguments), return_dict)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        num_frames: int = 1,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode images and decode them again as the frames of clips.

        Args:
            sample: Images, as `encode` takes them.
            sample_posterior: Whether to draw the latent, or to take the mode (default).
            return_dict: Whether to return an output class (default) or a tuple.
            generator: Where to draw from. By default torch's own generator.
            num_frames: Frames of a clip. By default each image is one of its own.

        Returns:
            As `decode`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError: As `encode`.
        """
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, num_frames, return_dict)

    __call__ = forward

    def decode_latents(
        self,
        z: Tensor,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        **arguments: Unpack[RunArguments],
    ) -> Tensor:
        """Decode latents of images, each as a clip of one frame.

        Args:
            z: As of `decode`.
            out: As of `decode`.
            **arguments: As of `decode`.

        Returns:
            Images `(N, out_channels, H, W)`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `decode`.

        Example:
            >>> image = vae.decode_latents(latent)  # doctest: +SKIP
        """
        return self._decoded(z, 1, out, **arguments)

    def decode_images(
        self,
        z: Tensor,
        *,
        num_frames: int = 1,
        out: Tensor | npt.NDArray[np.uint8] | None = None,
        on_rows: OnRows | None = None,
        finite: Tensor | None = None,
        **arguments: Unpack[RunArguments],
    ) -> Tensor:
        """Decode latents to what a pipeline shows: uint8 pictures, channels last.

        Args:
            z: As of `decode`.
            num_frames: Frames of a clip. By default each latent is an image of its own.
            out: As of `RBLNAutoencoderKL.decode_images`, and so are the others.
            on_rows: By default nothing is called. Rows of several clips are finished with the last.
            finite: By default a warning says if a frame was not.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `decode`.

        Returns:
            `out` as a tensor, or a new tensor: uint8 `(N, H, W, out_channels)`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `decode`.

        Example:
            >>> pictures = vae.decode_images(latents, num_frames=14)  # doctest: +SKIP
        """
        clips = self._clips(z, num_frames)
        if len(clips) == 1:
            return super().decode_images(z, out=out, on_rows=on_rows, finite=finite, **arguments)
        batch, channels, height, width = self.resolved_config.image_shape(tuple(z.shape))
        shape = (batch, height, width, channels)
        to, result = self._places(z, out, shape, torch.uint8)

        def on_rows_of_last(first: int, rows: Tensor) -> None:
            assert on_rows is not None
            on_rows(first, to[:, first : first + rows.shape[1]])

        for clip, told in self._told(clips, result, arguments):
            flags = None if finite is None else finite[clip]
            last = callable(on_rows) and clip.stop == batch
            rows = on_rows_of_last if last else on_rows if not callable(on_rows) else None
            super().decode_images(z[clip], out=to[clip], on_rows=rows, finite=flags, **told)
        return to if result is None else result.to(z.device)

    # Clips

    def _decoded(
        self,
        z: Tensor,
        num_frames: int,
        out: Tensor | npt.NDArray[Any] | None,
        **arguments: Unpack[RunArguments],
    ) -> Tensor:
        """The frames of clips, one clip after the other."""
        clips = self._clips(z, num_frames)
        if len(clips) == 1:
            return super().decode_latents(z, out=out, **arguments)
        shape = self.resolved_config.image_shape(tuple(z.shape))
        own = torch.float32 if z.dtype == torch.float64 else z.dtype
        to, result = self._places(z, out, shape, own)
        for clip, told in self._told(clips, result, arguments):
            super().decode_latents(z[clip], out=to[clip], **told)
        return to if result is None else result.to(z.device, z.dtype)

    def _clips(self, z: Tensor, num_frames: int) -> list[slice]:
        """Where each clip lies in a batch of latents."""
        check_tensor(z, "z", self.resolved_config.latent_channels)
        if type(num_frames) is not int or num_frames < 1 or len(z) % num_frames:
            raise ValueError(
                f"num_frames={num_frames!r} and z has {len(z)} frames, which must make whole "
                "clips: give the latents of one clip after the other, of num_frames each."
            )
        return [slice(n, n + num_frames) for n in range(0, len(z), num_frames)]

    def _places(
        self,
        z: Tensor,
        out: Tensor | npt.NDArray[Any] | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """Where the frames of all clips go, and the same if it is new memory of that dtype."""
        if out is not None:
            levels = dtype == torch.uint8
            return writable(out, shape, (dtype,)) if levels else writable(out, shape), None
        device = z.device if self._target.any_device else "cpu"  # where the target can write
        result = torch.empty(shape, dtype=dtype, device=device)
        return result, result

    def _told(
        self, clips: list[slice], result: Tensor | None, arguments: RunArguments
    ) -> Iterator[tuple[slice, RunArguments]]:
        """Each clip, and the arguments of its run.

        Progress counts all frames, and memory the whole `result`, if it is a new one.
        """
        reject_unknown(arguments, RunArguments.__annotations__, "argument of decode")
        progress, frames = arguments.get("progress"), clips[-1].stop
        limit = RBLNModelConfig.memory_limit.checked(arguments.get("memory_limit"))
        if result is not None:
            own = self._runtime_options(DECODER).memory_limit
            known = [each for each in (limit, own) if each is not None]
            element = 1 if result.dtype == torch.uint8 else 4  # floats count as float32
            limit = max(1, min(known) - element * result.numel()) if known else None
        for clip in clips:
            told: RunArguments = {**arguments, "memory_limit": limit}
            if callable(progress):
                told["progress"] = _after(clip.start, frames, progress)
            yield clip, told


def _after(begin: int, frames: int, progress: Progress) -> Progress:
    """A caller's function, which is told of a clip that begins at a frame of all frames."""
    return lambda done, _: progress(begin * PER_IMAGE + done, frames * PER_IMAGE)


class _Decoder(nn.Module):
    """The latents of a clip to its frames, under the names that the weights have in the model."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, z: Tensor) -> Tensor:
        frames: Tensor = self.decoder(z, image_only_indicator=None, num_frames=len(z))
        return frames


class _SpatioTemporalBlock(nn.Module):
    """A ResNet block over pixels, and then one over frames, mixed by a constant share.

    Args:
        block: That of diffusers, whose share depends on what its caller says of each frame.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.spatial_res_block = block.spatial_res_block
        self.temporal_res_block = over_frames = block.temporal_res_block
        if over_frames.conv_shortcut is not None:
            raise RBLNCompileError(
                "A temporal ResNet block of this model has a shortcut with weights, and no model "
                "of diffusers has one. Check that the model is one of diffusers' own classes."
            )
        # Of frames that are none of an image alone.
        mixer = block.time_mixer
        alpha = float(mixer.get_alpha(torch.zeros(1, 1), 3).detach())
        self.share = alpha if mixer.switch_spatial_to_temporal_mix else 1 - alpha

    def forward(
        self, x: Tensor, temb: Tensor | None = None, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        # (1, C, frames, H, W)
        clip = self.spatial_res_block(x, None).unsqueeze(0).transpose(1, 2)
        block = self.temporal_res_block
        found = block.conv1(block.nonlinearity(block.norm1(clip)))
        found = block.conv2(block.nonlinearity(block.norm2(found)))
        # Both of the mixed have the clip, so that the share is of what is added to it.
        mixed: Tensor = clip + found * self.share
        return mixed.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
