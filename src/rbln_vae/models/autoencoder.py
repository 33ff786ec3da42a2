"""What every compiled autoencoder does with images and latents, whatever its class."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import RBLNRuntimeError
from ..targets.base import OnRows
from .base import RBLNModel, RunArguments
from .family import DECODER, ENCODER, ImageShape

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from typing_extensions import Unpack

AutoencoderType = TypeVar("AutoencoderType", bound="RBLNAutoencoderModel")


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
        self, x: Tensor, **arguments: Unpack[RunArguments]
    ) -> DiagonalGaussianDistribution | Tensor:
        """Encode images, in the same way for every class.

        Args:
            x: Images `(N, in_channels, H, W)` in `[-1, 1]`, or uint8 pictures `(N, H, W,
                in_channels)`, without an axis of frames.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `encode`.

        Returns:
            The distribution of the latents `(N, latent_channels, h, w)`; the latents themselves
            if `draws` is `False`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `encode`.

        Example:
            >>> latent = vae.encode_images(image).mode()  # doctest: +SKIP
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        encoded = self._encoded(x, **arguments)
        return DiagonalGaussianDistribution(encoded) if self.draws else encoded

    def decode_latents(
        self,
        z: Tensor,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        **arguments: Unpack[RunArguments],
    ) -> Tensor:
        """Decode latents, in the same way for every class.

        Args:
            z: Latents `(N, latent_channels, h, w)`, without an axis of frames.
            out: As of `decode`. By default the result is a new tensor.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `decode`.

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
        sample = self._run(DECODER, z, to, **arguments)
        return sample.clamp_(-1, 1) if self.clamps else sample

    def decode_images(
        self,
        z: Tensor,
        *,
        out: Tensor | npt.NDArray[np.uint8] | None = None,
        on_rows: OnRows | None = None,
        finite: Tensor | None = None,
        **arguments: Unpack[RunArguments],
    ) -> Tensor:
        """Decode latents to what a pipeline shows: uint8 pictures, channels last.

        The pictures are bit by bit those that diffusers' `VaeImageProcessor` makes of the
        result of `decode` in the dtype of `z`: float32 shows the finest colours. On the target
        `cpu` no image of floats is made for them.

        Args:
            z: Latents as `decode_latents` takes them, `(N, latent_channels, h, w)`, or for
                classes with an axis of frames as `decode` does, `(N, latent_channels, 1, h, w)`.
            out: Where to write the pictures instead of to a new tensor: a tensor on the CPU, an
                array or a memory map of uint8, in the shape of the result and of any strides. It
                doesn't count against `memory_limit`.
            on_rows: Called with the first row and with rows `(N, rows, W, out_channels)` as they
                are finished in all pictures, from the top, once for each row; the rows lie in
                the result. It is called on the calling thread, and the run waits for it. What
                it raises ends the run and passes through. By default nothing is called.
            finite: A bool tensor `(N,)` that gets whether all values of each image were finite.
                By default a warning says if one was not. Infinities are shown as 0 and 255, a
                NaN as 0.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `decode`.

        Returns:
            `out` as a tensor, or a new tensor: uint8 `(N, H, W, out_channels)`, with an axis of
            frames where `z` has one: `(N, 1, H, W, out_channels)`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `decode`.

        Example:
            >>> pixels = vae.decode_images(latent)  # doctest: +SKIP
            >>> Image.fromarray(pixels[0].numpy()).save("image.png")  # doctest: +SKIP
        """
        frames = self.frames and isinstance(z, Tensor) and z.dim() == 5
        check_tensor(z, "z", self.resolved_config.latent_channels, frames=frames)
        if frames and z.shape[2] != 1:
            raise several_frames("z", z.shape[2])
        z = z[:, :, 0] if frames else z
        shape = self.resolved_config.image_shape(tuple(z.shape))
        return self._pictures(DECODER, z, shape, frames, out, on_rows, finite, **arguments)

    def _pictures(
        self,
        part: str,
        inputs: Tensor,
        image_shape: ImageShape,
        frames: bool,
        out: Tensor | npt.NDArray[np.uint8] | None,
        on_rows: OnRows | None,
        finite: Tensor | None,
        **arguments: Unpack[RunArguments],
    ) -> Tensor:
        """What a decoder gives for its checked input, as `decode_images`."""
        batch, channels, height, width = image_shape
        axis = (1,) if frames else ()
        shape = (batch, *axis, height, width, channels)
        to = None if out is None else writable(out, shape, (torch.uint8,))
        seen = torch.ones(batch, dtype=torch.bool)
        if finite is not None and (finite.dtype, finite.shape) != (seen.dtype, seen.shape):
            raise ValueError(
                f"finite must be a bool tensor of the shape ({batch},), and is {finite.dtype} of "
                f"{tuple(finite.shape)}."
            )

        def shown(levels: Tensor) -> Tensor:
            last = levels.permute(0, 2, 3, 1)
            return last.unsqueeze(1) if frames else last

        result = self._run(
            part,
            inputs,
            None if to is None else (to[:, 0] if frames else to).permute(0, 3, 1, 2),
            levels=True,
            finite=seen,
            on_rows=_on_pictures(on_rows, shown),
            **arguments,
        )
        if finite is not None:
            finite.copy_(seen)
        elif not seen.all():
            warnings.warn(
                "decode_images met values that aren't finite, and shows NaN as 0. Scaling of the "
                "latents that was left out or done twice is a common cause; decode gives the "
                "values.",
                RuntimeWarning,
                stacklevel=3,
            )
        return shown(result) if to is None else to

    def _encoded(self, x: Tensor, **arguments: Unpack[RunArguments]) -> Tensor:
        """The result of the encoder: moments if it gives a distribution, else latents."""
        self._check_encodes()
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            check_pictures(x, "x", self.resolved_config.in_channels)
            x = x.permute(0, 3, 1, 2)
        else:
            check_tensor(x, "x", self.resolved_config.in_channels)
        size, factor = (x.shape[2], x.shape[3]), self.resolved_config.vae_scale_factor
        self.family.check_image_size(size, factor, self._config)
        return self._run(ENCODER, x, **arguments)

    def _check_encodes(self) -> None:
        if not self.resolved_config.uses_encoder:
            raise RBLNRuntimeError(
                "This model has a decoder only (uses_encoder=False), so it can't encode. Compile "
                "it again with rbln_uses_encoder=True."
            )

    # What pipelines and their users read, besides the members of every model

    use_tiling = use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Run each image in less memory; the pixels stay the same.

        Nothing is tiled: some of the image is computed again instead of being kept. A run takes
        the least memory that it can in at most 1.5 times the time, by estimate, or 1.5 times the
        work on the targets `reference` and `cuda`; `rbln` ignores it. Models whose norms need no
        statistics of the image, such as Qwen-Image's, compute nothing again. `rbln-vae plan`
        shows what each limit costs, and `memory_limit` allows for less memory still.

        Args:
            use_tiling: Whether to do so, by default `True`.
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

    def __deepcopy__(self: AutoencoderType, memo: dict[int, Any]) -> AutoencoderType:
        copied = super().__deepcopy__(memo)
        copied._save_memory()
        return copied

    def _save_memory(self) -> None:
        for runtime in self._runtimes.values():
            runtime.save_memory(slicing=self.use_slicing, tiling=self.use_tiling)


def decoded(sample: Tensor, return_dict: bool) -> DecoderOutput | tuple[Tensor]:
    """Images as the `decode` of diffusers returns them."""
    if not return_dict:
        return (sample,)
    # A process that does without has 0.1 GB less to load.
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=sample)


def check_tensor(tensor: Tensor, name: str, channels: int, *, frames: bool = False) -> None:
    """Raise unless a tensor can be the input of a model.

    Args:
        tensor: The input of the caller.
        name: The name of the argument, for messages.
        channels: The channels that it must have.
        frames: Whether it must have an axis of frames, of any length, after the channels. By
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
    _check_dense(tensor, name)
    shape = tuple(tensor.shape)
    axes = 5 if frames else 4
    if len(shape) == axes and shape[1] == channels and 0 not in shape:
        return
    wanted = f"(N, {channels}, T, H, W)" if frames else f"(N, {channels}, H, W)"
    advice = {
        (4, 5): f" {name}.unsqueeze(2) adds the axis of frames.",
        (5, 4): f" {name}.squeeze(2) removes an axis of one frame.",
    }.get((len(shape), axes), "")
    raise ValueError(
        f"{name} must have the shape {wanted} with no empty axis, and has {shape}.{advice}"
    )


def check_pictures(pictures: Tensor, name: str, channels: int, *, frames: bool = False) -> None:
    """Raise a `ValueError` unless a uint8 tensor can be the input of an encoder.

    Args:
        pictures: The input of the caller.
        name: The name of the argument, for messages.
        channels: The channels that it must have, as its last axis.
        frames: Whether it must have an axis of frames, of any length, after the batch. By default
            it must have none.
    """
    _check_dense(pictures, name)
    shape = tuple(pictures.shape)
    axes = 5 if frames else 4
    if len(shape) == axes and shape[-1] == channels and 0 not in shape:
        return
    advice = ""
    if len(shape) == axes and shape[1] == channels:
        order = "0, 2, 3, 4, 1" if frames else "0, 2, 3, 1"
        advice = f" {name}.permute({order}) moves its channels there."
    elif len(shape) == 4 and frames:
        advice = f" {name}.unsqueeze(1) adds the axis of frames."
    elif len(shape) == 5 and not frames:
        advice = f" {name}.squeeze(1) removes an axis of one frame."
    wanted = f"(N, T, H, W, {channels})" if frames else f"(N, H, W, {channels})"
    raise ValueError(
        f"{name} is uint8, so it must hold pictures {wanted}, channels last and no axis empty, "
        f"and has the shape {shape}.{advice}"
    )


def several_frames(name: str, frames: int) -> ValueError:
    """The error of a video for a model that was compiled for images."""
    return ValueError(
        f"{name} has {frames} frames, and this model was compiled for images of one frame. Classes "
        "that run videos do so when they are compiled without rbln_num_frames=1 and for another "
        "target than 'rbln'."
    )


def _check_dense(tensor: Tensor, name: str) -> None:
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"{name} must be a dense tensor with data, and is {tensor.layout} on {tensor.device}."
        )


def _on_pictures(on_rows: OnRows | None, shown: Callable[[Tensor], Tensor]) -> OnRows | None:
    """A caller's function, which gets rows as pictures."""
    if not callable(on_rows):
        return on_rows
    return lambda first, rows: on_rows(first, shown(rows))


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def writable(
    out: Tensor | npt.NDArray[Any],
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = _FLOATS,
) -> Tensor:
    """The tensor that a caller gave to write to, or that shares the memory of an array.

    Args:
        out: What the caller gave.
        shape: That it must have.
        dtypes: Of which it must have one. By default floats.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    if not isinstance(out, Tensor):
        import numpy as np

        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a tensor or an array, and is a {type(out).__name__}.")
        if not out.flags.writeable:
            raise ValueError("out can't be written to. Open a memory map with mode 'r+' or 'w+'.")
        if str(out.dtype) not in names:
            raise TypeError(f"out must hold {' or '.join(names)}, and holds {out.dtype}.")
        out = torch.from_numpy(out)
    if out.dtype not in dtypes:
        raise TypeError(f"out must hold {' or '.join(names)}, and holds {out.dtype}.")
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have the shape {shape}, and has {tuple(out.shape)}.")
    return out.detach()
