"""What the autoencoders of videos do: whole videos, and frame by frame as they are done.

A whole call is a stream whose results go to their place in the result, so both give the same bits.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import RBLNModelConfig, reject_unknown
from ..targets.base import OnRows
from ..targets.stream import Chunks, Stream
from ..targets.watch import PER_IMAGE, Progress, ShouldStop
from .autoencoder import (
    RBLNAutoencoderModel,
    check_pictures,
    check_tensor,
    decoded,
    several_frames,
    writable,
)
from .base import RunArguments
from .family import DECODER, ENCODER

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from typing_extensions import Unpack


class RBLNVideoAutoencoder(RBLNAutoencoderModel):
    """A compiled autoencoder of videos, which also runs images of one frame."""

    frames = True

    def encode(
        self,
        x: Tensor,
        return_dict: bool = True,
        **arguments: Unpack[RunArguments],
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Turn videos into distributions of latents.

        Args:
            x: Videos `(N, in_channels, T, H, W)` in `[-1, 1]`, of any floating dtype and
                strides; or pictures `(N, T, H, W, in_channels)` of uint8. Of more than one frame,
                `1 + 4 n` are encoded, as diffusers does; a warning says if some are left out.
            return_dict: Whether to return an output class (default) or a tuple.
            **arguments: `should_stop`, `progress` and `memory_limit`: see `RunArguments`. Of
                videos, progress counts thousandths of frames of the latent.

        Returns:
            `AutoencoderKLOutput(latent_dist=…)`, or `(latent_dist,)`; `latent_dist` is
            diffusers' `DiagonalGaussianDistribution` over `(N, latent_channels, t, h, w)`.
            The latents are not normalised.

        Raises:
            ValueError: The shape or the device is wrong; or there are several frames, and the
                model was compiled for images.
            TypeError: It is no tensor of floats or uint8.
            RBLNRuntimeError: The encoder was not compiled, or there are no runtimes.
            TimeoutError: The run of a chunk of frames took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> latent = vae.encode(video).latent_dist.mode()  # doctest: +SKIP
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        x = self._given_frames(x)
        if x.shape[2] == 1:
            image = x[:, :, 0]
            if image.dtype == torch.uint8:
                image = image.permute(0, 2, 3, 1)
            moments = self._encoded(image, **arguments).unsqueeze(2)
        else:
            moments = self._whole(ENCODER, x, None, **arguments)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        *,
        out: Tensor | npt.NDArray[Any] | None = None,
        **arguments: Unpack[RunArguments],
    ) -> DecoderOutput | tuple[Tensor]:
        """Turn latents into videos.

        Args:
            z: Latents `(N, latent_channels, t, h, w)`, not normalised, of any floating dtype
                and strides.
            return_dict: Whether to return an output class (default) or a tuple.
            out: Where to write the videos, in the shape of the result: a tensor on the CPU, an
                array or a memory map of float32, float16 or bfloat16, of any strides. It doesn't
                count against `memory_limit`. By default the result is a new tensor.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `encode`. Of videos,
                progress counts thousandths of frames.

        Returns:
            `DecoderOutput(sample=…)`, or `(sample,)`: videos `(N, out_channels, T, f * h, f *
            w)` in `[-1, 1]`, of `T = 1 + 4 (t - 1)` frames where the model's
            `vae_scale_factor_temporal` is 4.

        Raises:
            ValueError: The shape or the device is wrong, of `z` or of `out`; or there are several
                frames, and the model was compiled for images.
            TypeError: One is no floating tensor.
            RBLNRuntimeError: There are no runtimes.
            TimeoutError: The run of a frame of the latent took longer than `timeout`.
            RBLNCancelledError: `should_stop` said so; what it raises itself passes through.
            MemoryError: It would need more than `memory_limit`.

        Example:
            >>> video = vae.decode(latent).sample  # doctest: +SKIP
        """
        z = self._latent_frames(z)
        if z.shape[2] == 1:
            image = self.decode_latents(z[:, :, 0], out=_frame_of(out), **arguments)
            return decoded(image.unsqueeze(2), return_dict)
        return decoded(self._whole(DECODER, z, out, **arguments), return_dict)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode videos and decode them again.

        Args:
            sample: Videos, as `encode` takes them.
            sample_posterior: Whether to draw the latent, or to take the mode (default).
            return_dict: Whether to return an output class (default) or a tuple.
            generator: Where to draw from. By default torch's own generator.

        Returns:
            As `decode`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError: As `encode`.
        """
        (posterior,) = self.encode(sample, return_dict=False)
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    __call__ = forward

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames per frame of the latent; the first is one by itself."""
        return int(2 ** sum(map(bool, self._config["temperal_downsample"])))

    # Frame by frame

    def decode_frames(
        self, z: Tensor | Iterable[Tensor], *, should_stop: ShouldStop | None = None
    ) -> Generator[Tensor, None, None]:
        """Decode latents, and yield each frame as it is done.

        That takes the same memory for videos of any length: one frame of the latent is decoded at
        a time, and its frames are yielded before the next one is read. Frames have the bits of
        `decode`. Any number of iterators may be in use at once, each by one thread at a time;
        closing one, or letting it go, gives its memory back.

        Args:
            z: Latents as `decode` takes them; or an iterable of them, whose frames follow each
                other and have the same size.
            should_stop: As of `encode`. By default runs are not stopped.

        Yields:
            `(N, out_channels, f * h, f * w)` in `[-1, 1]`, in the dtype of the latents and on
            their device. Each is a new tensor.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `decode`; those
                about a tensor `z` are raised by the call, others when the frame is asked for.

        Example:
            >>> for frame in vae.decode_frames(latent):  # doctest: +SKIP
            ...     show(frame)
        """
        _check_function("should_stop", should_stop)
        self._check_runs(DECODER)
        if isinstance(z, Tensor):
            z = (self._latent_frames(z, several=True),)
        elif not isinstance(z, Iterable):
            raise TypeError(f"z must be a tensor or an iterable of them, not a {type(z).__name__}.")
        given = itertools.chain.from_iterable(
            self._latent_frames(each, several=True).unbind(2) for each in z
        )
        return self._streamed(DECODER, given, should_stop)

    def encode_frames(
        self, frames: Tensor | Iterable[Tensor], *, should_stop: ShouldStop | None = None
    ) -> Generator[Tensor, None, None]:
        """Encode frames, and yield the moments of each frame of the latent as it is done.

        That takes the same memory for videos of any length. The moments have the bits of
        `encode`. To draw one latent of the whole video, collect them and draw once: drawing from
        each gives other numbers of a generator.

        Args:
            frames: A video as `encode` takes it; or an iterable of its frames, `(N, in_channels,
                H, W)`, or pictures `(N, H, W, in_channels)` of uint8, all of the same size.
            should_stop: As of `encode`. By default runs are not stopped.

        Yields:
            `(N, 2 * latent_channels, h, w)`, mean and logarithm of the variance: the first of one
            frame, and each other of as many as `vae_scale_factor_temporal` says. Frames at the
            end that make no whole chunk are left out, with a warning.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `encode`; those
                about a tensor are raised by the call, others when the moments are asked for.

        Example:
            >>> moments = torch.stack(list(vae.encode_frames(frames)), 2)  # doctest: +SKIP
        """
        _check_function("should_stop", should_stop)
        self._check_runs(ENCODER)
        if isinstance(frames, Tensor):
            given: Iterable[Tensor] = self._given_frames(frames, several=True).unbind(2)
        elif isinstance(frames, Iterable):
            given = map(self._given_frame, frames)
        else:
            raise TypeError(
                f"frames must be a tensor or an iterable of them, not a {type(frames).__name__}."
            )
        return self._streamed(ENCODER, given, should_stop)

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

        Args:
            z: As of `RBLNAutoencoderKL.decode_images`; or latents `(N, latent_channels, t, h, w)`
                of several frames.
            out: As of `RBLNAutoencoderKL.decode_images`, and so are the others; `on_rows` and
                `finite` are for latents of one frame.
            on_rows: By default nothing is called.
            finite: By default a warning says if an image of one frame was not.
            **arguments: `should_stop`, `progress` and `memory_limit`, as of `encode`.

        Returns:
            As `RBLNAutoencoderKL.decode_images`: `(N, H, W, out_channels)`, or with an axis of
            frames in `z` `(N, T, H, W, out_channels)`.

        Raises:
            ValueError, TypeError, RBLNRuntimeError, TimeoutError, MemoryError: As `decode`.

        Example:
            >>> pictures = vae.decode_images(latent)  # doctest: +SKIP
        """
        if not isinstance(z, Tensor) or z.dim() != 5 or z.shape[2] == 1:
            return super().decode_images(z, out=out, on_rows=on_rows, finite=finite, **arguments)
        if on_rows is not None or finite is not None:
            raise ValueError(
                "on_rows and finite are for latents of one frame. Use decode_frames for videos "
                "that are to be shown as they are done."
            )
        return self._whole(DECODER, self._latent_frames(z), out, levels=True, **arguments)

    # What they have in common

    def _whole(
        self,
        part: str,
        given: Tensor,
        out: Tensor | npt.NDArray[Any] | None,
        *,
        levels: bool = False,
        **arguments: Unpack[RunArguments],
    ) -> Tensor:
        """The results for whole videos `(N, C, T, H, W)`, one video after the other."""
        reject_unknown(arguments, RunArguments.__annotations__, "argument of a run")
        should_stop, progress = arguments.get("should_stop"), arguments.get("progress")
        _check_function("should_stop", should_stop)
        _check_function("progress", progress)
        limit = RBLNModelConfig.memory_limit.checked(arguments.get("memory_limit"))
        frame = (1, *given.shape[1:2], *given.shape[3:])
        chunks = self._chunks(part, frame)
        source = given.detach() if self._target.any_device else given.detach().cpu()
        runs = (source.shape[2] - chunks.taken[0]) // chunks.taken[1]
        count = chunks.given[0] + runs * chunks.given[1]
        batch, (_, channels, height, width) = len(source), chunks.result
        shape = (batch, channels, count, height, width)
        if levels:
            shape = (batch, count, height, width, channels)
        dtype = source.dtype if source.is_floating_point() else torch.float32
        if out is None:
            result = torch.empty(
                shape, dtype=torch.uint8 if levels else dtype, device=source.device
            )
        else:
            result = writable(out, shape, (torch.uint8,)) if levels else writable(out, shape)
        to = result.permute(0, 4, 1, 2, 3) if levels else result
        held = 0 if out is not None else (1 if levels else 4) * result.numel()
        for n in range(batch):
            stream = self._stream(part, frame, held, limit)
            begin = done = 0
            while begin + stream.taken <= source.shape[2]:
                frames = source[n : n + 1, :, begin : begin + stream.taken].unbind(2)
                places = to[n : n + 1, :, done : done + stream.given].unbind(2)
                begin, done = begin + len(frames), done + len(places)
                stream.run(frames, places, should_stop, levels=levels)
                if not levels:
                    for place in places:
                        self._limited(part, place)
                _report(progress, n * count + done, batch * count)
            stream.close()
        return result.to(given.device) if out is None else result

    def _streamed(
        self, part: str, given: Iterable[Tensor], should_stop: ShouldStop | None
    ) -> Generator[Tensor, None, None]:
        """The results for frames, as they are done."""
        stream: Stream | None = None
        frames: list[Tensor] = []
        try:
            for frame in given:
                if stream is None:
                    stream = self._stream(part, tuple(frame.shape))
                source = frame.detach() if self._target.any_device else frame.detach().cpu()
                # What waits for the rest of its chunk is a copy: the next may come in its memory.
                frames.append(source if len(frames) + 1 == stream.taken else source.clone())
                if len(frames) == stream.taken:
                    results = stream.run(frames, should_stop=should_stop)
                    frames.clear()
                    while results:
                        yield self._limited(part, results.pop(0)).to(frame.device)
            _warn_of_rest(len(frames))
        finally:
            if stream is not None:
                stream.close()

    def _chunks(self, part: str, frame: tuple[int, ...]) -> Chunks:
        if part == ENCODER:
            size, factor = (frame[2], frame[3]), self.resolved_config.vae_scale_factor
            self.family.check_image_size(size, factor, self._config)
        return self._runtime(part, frame).chunks(frame)

    def _stream(
        self,
        part: str,
        frame: tuple[int, ...],
        result_bytes: int | None = None,
        memory_limit: int | None = None,
    ) -> Stream:
        self._chunks(part, frame)
        return self._runtime(part, frame).stream(frame, result_bytes, memory_limit)

    def _check_runs(self, part: str) -> None:
        """Raise unless a part runs."""
        if part == ENCODER:
            self._check_encodes()
        self._runtime(part, self.resolved_config.input_shapes()[part])

    def _limited(self, part: str, frame: Tensor) -> Tensor:
        return frame.clamp_(-1, 1) if self.clamps and part == DECODER else frame

    def _check_several(self, name: str, shape: tuple[int, ...], axis: int) -> None:
        """Raise if there are several frames, and the model was compiled for images."""
        if shape[axis] > 1 and not self.resolved_config.videos:
            raise several_frames(name, shape[axis])

    def _latent_frames(self, z: Tensor, *, several: bool = False) -> Tensor:
        """Latents with an axis of frames; with `several` for a stream."""
        check_tensor(z, "z", self.resolved_config.latent_channels, frames=True)
        self._check_several("z", (2,) if several else tuple(z.shape), 0 if several else 2)
        return z

    def _given_frames(self, x: Tensor, *, several: bool = False) -> Tensor:
        """A video `(N, C, T, H, W)`, without the frames that make no whole chunk."""
        channels = self.resolved_config.in_channels
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            check_pictures(x, "x", channels, frames=True)
            x = x.permute(0, 4, 1, 2, 3)
        else:
            check_tensor(x, "x", channels, frames=True)
        self._check_encodes()
        self._check_several("x", (2,) if several else tuple(x.shape), 0 if several else 2)
        rest = 0 if several else (x.shape[2] - 1) % self.family.frames_encoded
        _warn_of_rest(rest)
        return x[:, :, : x.shape[2] - rest]

    def _given_frame(self, frame: Tensor) -> Tensor:
        """One frame `(N, C, H, W)` of a video."""
        channels = self.resolved_config.in_channels
        if isinstance(frame, Tensor) and frame.dtype == torch.uint8:
            check_pictures(frame, "a frame", channels)
            return frame.permute(0, 3, 1, 2)
        check_tensor(frame, "a frame", channels)
        return frame


def _warn_of_rest(frames: int) -> None:
    if frames:
        warnings.warn(
            f"The last {frames} frames make no whole chunk, and are left out, as by diffusers. "
            "Give 1 + 4 n frames to encode all.",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_function(name: str, function: object) -> None:
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be a function, and is a {type(function).__name__}.")


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done * PER_IMAGE, total * PER_IMAGE)


def _frame_of(out: Tensor | npt.NDArray[Any] | None) -> Any:
    """The only frame of a tensor or an array to write to; what isn't one is refused later."""
    axes = getattr(out, "ndim", None)
    if out is None or axes is None:
        return out
    if axes != 5 or out.shape[2] != 1:
        raise ValueError(
            f"out must have the shape (N, C, 1, H, W), and has {tuple(out.shape)}. "
            "out.unsqueeze(2) of a tensor, or out[:, :, None] of an array, adds the axis of frames."
        )
    return out[:, :, 0]
