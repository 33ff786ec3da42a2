"""The wire protocol of diffusers' remote VAE client, `diffusers.utils.remote_utils`.

All functions are pure. `decode_input` and `encode_input` derive the expected body from a query
and a model before the body is read. Other functions turn a body into the input of the model,
and a result into the bytes and headers that the client reads.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..images import load_image, open_image, to_levels, with_opacity
from ..models.latents import LatentScaling
from ..sizes import check_image_size
from .errors import RefusedError
from .models import LONGEST_NAME, ModelInfo, Output, Shape
from .png import encode_png

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
Dtype = Literal["float32", "float16", "bfloat16"]

TENSOR = "tensor/binary"
IMAGE_TYPES = {"png": "image/png", "jpg": "image/jpeg"}
VIDEO_TYPE = "video/mp4"

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
"""The formats of pictures that are read; the size is known before decoding."""

_LARGEST_SIDE = 1 << 24
_MOST_FPS = 240
_MOST_AXES = 8

_JPEG_QUALITY = 95


class PlanQuery(BaseModel):
    """The query of every address that is about a model."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(
        None, max_length=LONGEST_NAME, description="The model; by default the first one."
    )


class Query(PlanQuery):
    """The query of a request that sends a tensor or a picture."""

    scaling_factor: float | None = Field(
        None, gt=0, description="Encoding multiplies latents by it, decoding divides."
    )
    shift_factor: float | None = Field(
        None, description="Encoding subtracts it before scaling, decoding adds it after."
    )


class DecodeQuery(Query):
    """The query of `remote_decode`."""

    shape: list[int] = Field(
        min_length=1,
        max_length=_MOST_AXES,
        description="The shape of the latent: (N, C, H, W), for models of videos also (N, C, T, H, "
        "W), or packed (N, H / 2 * W / 2, 4 * C). One parameter for each number.",
    )
    dtype: Dtype = Field(description="The dtype of the latent; a result tensor has the same.")
    output_type: Literal["pil", "pt", "mp4"] = Field(
        "pil",
        description="A picture, a tensor (N, C, H, W) or of videos (N, C, T, H, W) in [-1, 1], or "
        "a video, which comes while it is decoded.",
    )
    fps: float = Field(
        16, gt=0, le=_MOST_FPS, description="With output_type=mp4, the frames per second."
    )
    image_format: Literal["png", "jpg"] = Field("jpg", description="The format of the picture.")
    partial_postprocess: bool = Field(
        False,
        description="With output_type=pt, return uint8 (N, H, W, C), of a video (T, H, W, C), "
        "instead.",
    )
    do_scaling: bool = Field(
        False, description="Take missing factors from the model's configuration."
    )
    height: int | None = Field(
        None, gt=0, le=_LARGEST_SIDE, description="The height of the image, for packed latents."
    )
    width: int | None = Field(
        None, gt=0, le=_LARGEST_SIDE, description="The width of the image, for packed latents."
    )
    input_tensor_type: Literal["binary"] = Field(
        "binary", description="How a tensor is sent; older clients name it."
    )
    output_tensor_type: Literal["binary"] = Field(
        "binary", description="How a tensor is returned; older clients name it."
    )


class EncodeQuery(Query):
    """The query of `remote_encode`."""

    shape: list[int] | None = Field(
        None,
        min_length=1,
        max_length=_MOST_AXES,
        description="The shape of the image (N, C, H, W) in [-1, 1], for models of videos also "
        "(N, C, 1, H, W), if the body is a tensor. "
        "One parameter for each number.",
    )
    dtype: Dtype | None = Field(None, description="The dtype of the tensor; not for a picture.")


@dataclass(frozen=True)
class TensorInput:
    """The expected tensor in a body.

    Attributes:
        shape: The shape of the tensor in the request.
        dtype: The dtype of its elements.
        model_shape: The shape of the model's input: `(N, C, H, W)`, or of videos
            `(1, C, T, H, W)`.
    """

    shape: Shape
    dtype: torch.dtype
    model_shape: Shape

    @property
    def bytes(self) -> int:
        """The length of the body."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, body: bytearray) -> Tensor:
        """The tensor in the shape of the request; it shares the memory of the body.

        Raises:
            RefusedError: The length is wrong, or an element is not finite.
        """
        if len(body) != self.bytes:
            raise wrong_body_size(self, len(body))
        tensor = torch.frombuffer(body, dtype=self.dtype).reshape(self.shape)
        if not _is_finite(tensor):
            raise RefusedError(
                422,
                "not_finite",
                "The tensor holds NaN or infinity. Look for an overflow where it was made, and "
                "check that dtype names the type of the bytes.",
            )
        return tensor


def wrong_body_size(expected: TensorInput, found: int) -> RefusedError:
    """The error of a body whose length does not match its shape."""
    return RefusedError(
        422,
        "wrong_body_size",
        f"A tensor of shape {_text(expected.shape)} in {_name(expected.dtype)} has "
        f"{expected.bytes:,} bytes, and the body has {found:,}. Send the raw bytes of the tensor, "
        "contiguous, and its own shape and dtype.",
    )


# Decoding


def decode_input(query: DecodeQuery, model: ModelInfo, accept: str = "") -> TensorInput:
    """The expected body of a decode request.

    Args:
        query: The query of the request.
        model: The model.
        accept: The `Accept` header of the request, by default empty.

    Raises:
        RefusedError: The shape does not fit the model.
    """
    shape = _positive(query.shape)
    if query.output_type == "mp4" or (model.frames and len(shape) == 5 and shape[2] > 1):
        _check_video(shape, query, model, accept)
        return TensorInput(shape, DTYPES[query.dtype], shape)
    image_shape = _without_frames(shape, model)
    patch = _scaling(query, model).patch_size
    channels = patch**2 * model.latent_channels
    if len(shape) == 3:
        model_shape = _unpacked_shape(shape, query, model)
    elif len(image_shape) == 4 and image_shape[1] == channels:
        batch, _, height, width = image_shape
        model_shape = (batch, model.latent_channels, patch * height, patch * width)
    else:
        raise RefusedError(
            422,
            "wrong_shape",
            f"The model {model.name!r} decodes latents of shape (N, {channels}, H, W), or packed "
            f"(N, H / 2 * W / 2, {4 * model.latent_channels}) with height and width. It got "
            f"{_text(shape)}.",
        )
    if query.output_type == "pil" and model_shape[0] != 1:
        raise RefusedError(
            422,
            "wrong_shape",
            f"A picture shows one image, and the latent {_text(shape)} holds {shape[0]}. Send "
            "them one by one, or ask for output_type=pt with partial_postprocess=true.",
        )
    return TensorInput(shape, DTYPES[query.dtype], model_shape)


def _check_video(shape: Shape, query: DecodeQuery, model: ModelInfo, accept: str) -> None:
    """Raise unless the latent is that of a video, and can be shown as it was asked."""
    if model.frames_per_latent is None:
        why = (
            "was compiled for images of one frame. Compile it again without rbln_num_frames=1, and "
            "for another target than 'rbln'"
            if model.frames
            else f"is a model of images, {model.class_name}. Name one of videos, such as Wan's"
        )
        raise RefusedError(422, "no_video", f"The model {model.name!r} {why}.")
    if len(shape) != 5 or shape[1] != model.latent_channels:
        raise RefusedError(
            422,
            "wrong_shape",
            f"The model {model.name!r} decodes videos from latents of shape "
            f"(1, {model.latent_channels}, T, H, W), and this one has {_text(shape)}.",
        )
    output = output_of(query, accept)
    if output == "pictures" and query.output_type == "pil":
        raise RefusedError(
            422,
            "wrong_shape",
            f"A picture shows one image, and the latent {_text(shape)} is that of a video. Ask for "
            "output_type=mp4, or for a tensor: output_type=pt, or a processor.",
        )
    if shape[0] != 1 and not (query.output_type == "pt" and output == "sample"):
        raise RefusedError(
            422,
            "wrong_shape",
            f"The latent {_text(shape)} holds {shape[0]} videos, and one is shown. Send them one "
            "by one, or ask for output_type=pt without partial_postprocess.",
        )
    if output == "frames" and model.in_channels != 3:
        raise RefusedError(
            422,
            "no_video",
            f"The model {model.name!r} gives frames of {model.in_channels} channels, and those of "
            "a video file have 3. Ask for output_type=pt.",
        )


def _without_frames(shape: Shape, model: ModelInfo) -> Shape:
    """A shape without its axis of frames, if it has one and the model takes it."""
    if len(shape) != 5 or not model.frames:
        return shape
    if shape[2] != 1:
        raise RefusedError(
            422,
            "wrong_shape",
            f"The model {model.name!r} encodes images of one frame here, (N, C, 1, H, W), and this "
            f"one has {_text(shape)}. Send the frames one by one, if they are images of their own.",
        )
    return (*shape[:2], *shape[3:])


def _unpacked_shape(shape: Shape, query: DecodeQuery, model: ModelInfo) -> Shape:
    """The unpacked shape of a packed latent, in which each row holds 2x2 cells."""
    if query.height is None or query.width is None:
        raise RefusedError(
            422,
            "wrong_shape",
            f"A packed latent, such as this of shape {_text(shape)}, needs the height and the "
            "width of its image.",
        )
    pixels = 2 * model.vae_scale_factor
    rows, columns = query.height // pixels, query.width // pixels
    expected = (shape[0], rows * columns, 4 * model.latent_channels)
    if shape != expected or not rows or not columns:
        raise RefusedError(
            422,
            "wrong_shape",
            f"The packed latent of an image of height {query.height} and width {query.width} has "
            f"the shape {_text(expected)} for the model {model.name!r}, and this one has "
            f"{_text(shape)}.",
        )
    return (shape[0], model.latent_channels, 2 * rows, 2 * columns)


def prepare_latent(
    latent: Tensor, query: DecodeQuery, model: ModelInfo, expected: TensorInput
) -> Tensor:
    """The unscaled latent for the decoder, as pipelines compute it."""
    scaling = _scaling(query, model)
    if len(expected.model_shape) == 5:
        return scaling.unscale(latent.transpose(1, 2)).transpose(1, 2)
    if latent.dim() == 5:
        latent = latent.squeeze(2)
    if latent.dim() == 3:
        batch, channels, height, width = expected.model_shape
        cells = latent.view(batch, height // 2, width // 2, channels, 2, 2)
        latent = cells.permute(0, 3, 1, 4, 2, 5).reshape(expected.model_shape)
        latent = scaling.patched(latent)
    return scaling.unscale(latent)


def _scaling(query: DecodeQuery, model: ModelInfo) -> LatentScaling:
    """The scaling to undo: the constants of the query, or with `do_scaling` those of the model."""
    scaling = _asked_for(query, model.scaling if query.do_scaling else LatentScaling())
    if not scaling.known:
        raise RefusedError(
            422,
            "unknown_scaling",
            f"The scaling of the latents of {model.name!r} isn't known on this server. Send "
            "scaling_factor and shift_factor, or unscaled latents without do_scaling.",
        )
    return scaling


def _asked_for(query: DecodeQuery | EncodeQuery, scaling: LatentScaling) -> LatentScaling:
    """The scaling, with the constants of a query in place of its own."""
    factor, shift = query.scaling_factor, query.shift_factor
    return dataclasses.replace(
        scaling,
        scaling_factor=scaling.scaling_factor if factor is None else factor,
        shift_factor=scaling.shift_factor if shift is None else shift,
        known=scaling.known or factor is not None,
    )


@dataclass(frozen=True)
class Reply:
    """The body, media type and headers of a successful response."""

    body: bytes
    media_type: str
    headers: dict[str, str]


def output_of(query: DecodeQuery, accept: str) -> Output:
    """What the model gives for the response: levels where it shows pictures.

    Args:
        query: The query of the request.
        accept: The `Accept` header of the request. With `output_type=pil` and a processor,
            the client asks for a tensor in `[0, 1]` with it.
    """
    if query.output_type == "mp4":
        return "frames"
    shown = query.partial_postprocess if query.output_type == "pt" else TENSOR not in accept
    return "pictures" if shown else "sample"


def sample_reply(sample: Tensor, query: DecodeQuery) -> Reply:
    """The response that `remote_decode` reads if it shows no pictures.

    Args:
        sample: The decoded images `(N, C, H, W)`, or videos `(N, C, T, H, W)`, approximately in
            `[-1, 1]`.
        query: The query of the request.

    Raises:
        RefusedError: The result can't be returned in the requested form.
    """
    if query.output_type == "pt":
        # As it was asked: with an axis of frames if the latent had one.
        framed = len(query.shape) == 5 and sample.dim() == 4
        return tensor_reply(sample.unsqueeze(2) if framed else sample)
    _require_finite(_is_finite(sample))
    if sample.dim() == 5:  # the client takes the frames of a video as a batch
        sample = sample[0].transpose(0, 1)
    shown: Any = VaeImageProcessor.denormalize(sample)
    return tensor_reply(shown)


def picture_reply(pictures: Tensor, finite: bool, query: DecodeQuery) -> Reply:
    """The response that `remote_decode` reads if it shows pictures.

    Args:
        pictures: uint8 `(N, H, W, C)`, or of a video `(1, T, H, W, C)`.
        finite: Whether all values that they show were.
        query: The query of the request.

    Raises:
        RefusedError: The result can't be returned in the requested form.
    """
    _require_finite(finite)
    if query.output_type == "pt":
        # The client takes the frames of a video as a batch.
        return tensor_reply(pictures[0] if pictures.dim() == 5 else pictures)
    picture = pictures[0].numpy()
    shown_channels = (1, 3, 4) if query.image_format == "png" else (1, 3)
    if picture.shape[2] not in shown_channels:
        raise RefusedError(
            422,
            "wrong_shape",
            f"A result of {picture.shape[2]} channels is no picture in the format "
            f"{query.image_format}. Ask for output_type=pt, or for 4 channels, of which the last "
            "is the opacity, for image_format=png.",
        )
    file = encode_png(picture) if query.image_format == "png" else _encode_jpeg(picture)
    return Reply(file, IMAGE_TYPES[query.image_format], {})


def _encode_jpeg(levels: np.ndarray) -> bytes:
    image = Image.fromarray(levels.squeeze(2) if levels.shape[2] == 1 else levels)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def _is_finite(tensor: Tensor) -> bool:
    # One pass without a copy; both results are NaN if any element is.
    low, high = torch.aminmax(tensor)
    return math.isfinite(low) and math.isfinite(high)


def _require_finite(finite: bool) -> None:
    if not finite:
        raise not_finite("The result isn't finite")


def not_finite(what: str) -> RefusedError:
    """The error of a result that can't be shown because it has NaN or infinity."""
    return RefusedError(
        422,
        "not_finite",
        f"{what.removesuffix('.')}, so it can't be shown. output_type=pt without "
        "partial_postprocess gives it as it is; scaling that was left out or done twice is a "
        "common cause.",
    )


def tensor_reply(tensor: Tensor) -> Reply:
    """The raw bytes of a tensor, with its shape and dtype as headers."""
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    shape = json.dumps(list(tensor.shape))
    return Reply(raw, TENSOR, {"shape": shape, "dtype": _name(tensor.dtype)})


# Encoding


def encode_input(query: EncodeQuery, model: ModelInfo) -> TensorInput | None:
    """The expected body of an encode request; `None` is a picture.

    Raises:
        RefusedError: The shape does not fit the model.
    """
    if query.shape is None and query.dtype is None:
        if model.in_channels not in (3, 4):
            raise RefusedError(
                422,
                "wrong_shape",
                f"The model {model.name!r} encodes images of {model.in_channels} channels, and a "
                "picture has 3, or 4 with its opacity. Send a tensor, with shape and dtype.",
            )
        return None
    if query.shape is None or query.dtype is None:
        raise RefusedError(
            422,
            "invalid_query",
            "A tensor needs both shape and dtype in the query, a picture neither of them.",
        )
    shape = _positive(query.shape)
    model_shape = _without_frames(shape, model)
    if len(model_shape) != 4 or shape[1] != model.in_channels:
        raise RefusedError(
            422,
            "wrong_shape",
            f"The model {model.name!r} encodes images of shape (N, {model.in_channels}, H, W) in "
            f"[-1, 1], and this one has {_text(shape)}.",
        )
    try:
        check_image_size((model_shape[2], model_shape[3]), model.vae_scale_factor)
    except ValueError as error:
        raise RefusedError(422, "wrong_shape", str(error)) from None
    return TensorInput(shape, DTYPES[query.dtype], model_shape)


def picture_size(body: bytearray) -> tuple[int, int]:
    """The height and width of a picture; reads only its header.

    Raises:
        RefusedError: The body is not a picture in a supported format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(io.BytesIO(body), PICTURE_FORMATS) as image:
                return image.height, image.width
    except UnidentifiedImageError:
        raise _not_an_image() from None


def fitted_size(size: tuple[int, int], model: ModelInfo) -> tuple[int, int]:
    """The size at which a picture is encoded: each side rounded down to a multiple of the factor.

    This is what diffusers does.

    Raises:
        RefusedError: The picture is smaller than one latent cell.
    """
    factor = model.vae_scale_factor
    height, width = (side - side % factor for side in size)
    if not (height and width):
        raise RefusedError(
            422,
            "wrong_shape",
            f"The picture is {size[0]} pixels high and {size[1]} wide, and the least that the "
            f"model {model.name!r} encodes is {factor} by {factor}.",
        )
    return height, width


def read_picture(body: bytearray, model: ModelInfo) -> Tensor:
    """A picture as the input of the encoder, uint8 `(1, C, H, W)`, scaled as by diffusers.

    Raises:
        RefusedError: The picture is damaged.
    """
    try:
        image = load_image(io.BytesIO(body))
    except UnidentifiedImageError:
        raise _not_an_image() from None
    processor: Any = VaeImageProcessor(vae_scale_factor=model.vae_scale_factor)
    height, width = processor.get_default_height_width(image)
    levels = with_opacity(to_levels(processor.resize(image, height, width)), model.in_channels)
    return levels.permute(0, 3, 1, 2)


def _not_an_image() -> RefusedError:
    return RefusedError(
        422,
        "not_an_image",
        f"The body can't be read as a picture ({', '.join(PICTURE_FORMATS)}). Send one of these, "
        "or a tensor with shape and dtype in the query.",
    )


def encode_reply(latent: Tensor, query: EncodeQuery, model: ModelInfo) -> Reply:
    """The response that `remote_encode` reads: the latent, scaled if requested.

    It has an axis of frames where the model's latents have one, unless the request was a tensor
    without it.
    """
    latent = _asked_for(query, LatentScaling()).scale(latent)
    if model.frames and (query.shape is None or len(query.shape) == 5):
        latent = latent.unsqueeze(2)
    return tensor_reply(latent)


def _positive(shape: list[int]) -> Shape:
    if not all(0 < side <= _LARGEST_SIDE for side in shape):
        raise RefusedError(
            422,
            "wrong_shape",
            f"Every side of a shape is 1 to {_LARGEST_SIDE:,}, and this one is "
            f"{_text(tuple(shape))}.",
        )
    return tuple(shape)


def _text(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
