"""Layers of diffusers in the form in which they are compiled, for families that share them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph.capture import replica

Layers = Mapping[str, Callable[[Any], nn.Module]]
"""What makes a layer to compile of a layer of diffusers, by the end of its class's name."""


def converted(module: nn.Module, layers: Layers) -> nn.Module:
    """A copy of a module in which some layers are replaced.

    Modules that contain these layers keep the code of diffusers.

    Args:
        module: The module. It is not changed, and the copy shares its weights.
        layers: The replacements.
    """
    return _converted(replica(module), layers)


def _converted(module: nn.Module, layers: Layers) -> nn.Module:
    for name, convert in layers.items():
        if type(module).__name__.endswith(name):
            return convert(module)
    for name, child in module.named_children():
        setattr(module, name, _converted(child, layers))
    return module


def conv2d(weight: Tensor, bias: Tensor | None = None, **options: Any) -> nn.Conv2d:
    """A convolution with given weights `(out, in, height, width)` and bias.

    Args:
        weight: The kernels.
        bias: By default none.
        **options: `stride` and `padding` of `torch.nn.Conv2d`.
    """
    outputs, inputs, height, width = weight.shape
    with_bias = bias is not None
    conv = nn.Conv2d(inputs, outputs, (height, width), bias=with_bias, device="meta", **options)
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return conv


def centred(conv: nn.Conv2d, matrix: Tensor) -> nn.Conv2d:
    """A 3x3 convolution that adds a matrix times each pixel to the result of another.

    Args:
        conv: The other convolution.
        matrix: `(out, in)`.
    """
    weight = conv.weight.detach().clone()
    weight[:, :, 1, 1] += matrix.to(weight)
    return conv2d(weight, conv.bias, stride=conv.stride, padding=conv.padding)


def means(outputs: int, inputs: int) -> Tensor:
    """The matrix `(outputs, inputs)` that takes the means of consecutive groups of channels."""
    return torch.eye(outputs).repeat_interleave(inputs // outputs, dim=1) * outputs / inputs


def repeats(outputs: int, inputs: int) -> Tensor:
    """The matrix `(outputs, inputs)` that repeats each channel."""
    return torch.eye(inputs).repeat_interleave(outputs // inputs, dim=0)


class Attention(nn.Module):
    """Attention between the pixels of an image with one head, and its input added.

    Args:
        norm: Applied first.
        query: A 1x1 convolution, as the others.
        key: For keys.
        value: For values.
        projection: Of the result.
    """

    def __init__(
        self,
        norm: nn.Module,
        query: nn.Module,
        key: nn.Module,
        value: nn.Module,
        projection: nn.Module,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.to_q, self.to_k, self.to_v, self.proj = query, key, value, projection

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        normalised, pixels = self.norm(x), (batch, height * width, 1, channels)
        query, key, value = (
            layer(normalised).flatten(2).transpose(1, 2).reshape(pixels).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        image = mixed.reshape(batch, height * width, channels).transpose(1, 2).reshape(x.shape)
        found: Tensor = self.proj(image) + x
        return found


class Shuffled(nn.Module):
    """Channels in another order, then taken as the pixels of cells; or the inverse of both.

    Args:
        order: For each channel before the cells are made, or after they are taken apart, which
            one it is. Cells have the order channel, row, column.
        up: Whether the image doubles; else it halves.
    """

    order: Tensor

    def __init__(self, order: Tensor, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return F.pixel_shuffle(x.index_select(1, self.order), 2)
        return F.pixel_unshuffle(x, 2).index_select(1, self.order)
