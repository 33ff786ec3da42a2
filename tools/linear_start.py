"""Start weights under which an AutoencoderKL is a linear transform coder.

From random weights a small model spends thousands of steps on grey pictures: its group norms
remove the offset of each picture, and with it the colours. Here the encoder starts as a
principal component analysis of square blocks and the decoder as the least-squares inverse,
so the first reconstruction is already a blurred photograph in the right colours.

Three devices make a stack of norms and SiLUs linear:

- Residual branches start weak, so the signal takes the shortcuts.
- In front of a norm and SiLU each value x is stored as the pair x and -x, because
  silu(x) - silu(-x) = x.
- The other channels of the norm's groups hold large constants, which keep the variance of
  the group, and so its gain, about the same for all pictures.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

QUIET = 0.1  # factor on the last convolution of each residual branch
CONSTANTS = (4.0, 3.0)  # in the last norm of the encoder and of the decoder
LOG_VARIANCE = -7.0  # of the latents at the start
RIDGE = 1e-4


class _SeenError(Exception):
    """Ends a forward pass once the wanted input is known."""


def carry(conv: nn.Conv2d, first: int = 0) -> None:
    """Make the outputs from `first` on copies of the inputs, as many as there are of both."""
    middle = conv.kernel_size[0] // 2
    count = min(conv.in_channels, conv.out_channels - first)
    conv.weight[first : first + count] = 0
    conv.bias[first : first + count] = 0
    for channel in range(count):
        conv.weight[first + channel, channel, middle, middle] = 1


def write_pairs(conv: nn.Conv2d, count: int, groups: int, constant: float) -> None:
    """Make the 1x1 `conv` store its first inputs as pairs, spread over the groups of a norm."""
    conv.weight.zero_()
    conv.bias[0::2], conv.bias[1::2] = constant, -constant
    for value, channel in enumerate(pair_channels(conv.out_channels, count, groups)):
        conv.weight[channel, value], conv.weight[channel + 1, value] = 1, -1
        conv.bias[channel : channel + 2] = 0


def read_pairs(conv: nn.Conv2d, count: int, groups: int, constant: float, power: float) -> None:
    """Make the first outputs of `conv` the values of the pairs, whose mean square is `power`."""
    share = 2 * -(-count // groups) * groups / conv.in_channels
    gain = math.sqrt((1 - share) * constant**2 + share * power)
    conv.weight[:count] = 0
    conv.weight[count:] *= QUIET
    conv.bias.zero_()
    for value, channel in enumerate(pair_channels(conv.in_channels, count, groups)):
        conv.weight[value, channel, 1, 1], conv.weight[value, channel + 1, 1, 1] = gain, -gain


def pair_channels(channels: int, count: int, groups: int) -> list[int]:
    """The first channel of each pair: the groups take turns."""
    return [(i % groups) * (channels // groups) + 2 * (i // groups) for i in range(count)]


def principal_components(conv: nn.Conv2d, images: torch.Tensor, keep: int, whiten: bool) -> None:
    """Make the first outputs of the stride-2 `conv` the best components of 2x2 blocks."""
    blocks = F.unfold(images, 2, stride=2).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh((blocks.T @ blocks).double() / len(blocks))
    rows = vectors.flip(1)[:, :keep].T
    if whiten:
        rows = rows / values.flip(0)[:keep, None].sqrt()
    conv.weight[:keep] = 0
    conv.bias[:keep] = 0
    conv.weight[:keep, : images.shape[1], :2, :2] = rows.reshape(keep, -1, 2, 2).float()


def fit(conv: nn.Conv2d, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Make the first outputs of `conv` the least-squares estimate of `targets`."""
    columns = F.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1)
    goals = targets.permute(0, 2, 3, 1).flatten(0, 2)
    chosen = torch.randperm(len(columns))[:60000]
    columns, goals = F.pad(columns[chosen], (0, 1), value=1.0), goals[chosen]
    gram = (columns.T @ columns).double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, (columns.T @ goals).double()).float()
    count = goals.shape[1]
    conv.weight[:count] = solution[:-1].T.reshape(count, -1, 3, 3)
    conv.bias[:count] = solution[-1]


def input_of(conv: nn.Module, model: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """What reaches `conv` when the model decodes the latents."""
    seen = []

    def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _SeenError

    hook = conv.register_forward_pre_hook(stop)
    try:
        model.decode(latents)
    except _SeenError:
        pass
    finally:
        hook.remove()
    return seen[0]


def start_encoder(model: AutoencoderKL, images: torch.Tensor) -> list[torch.Tensor]:
    """Make the encoder a block transform; return the images and the features of each scale."""
    encoder, latents = model.encoder, model.config.latent_channels
    groups, constant = model.config.norm_num_groups, CONSTANTS[0]
    carry(encoder.conv_in)
    encoder.conv_in.weight[3:] *= 0.3
    features = [images]
    for block in encoder.down_blocks[:-1]:
        conv, last = block.downsamplers[0].conv, len(features) == len(encoder.down_blocks) - 1
        keep = latents if last else min(conv.out_channels, 4 * features[-1].shape[1])
        principal_components(conv, features[-1], keep, whiten=last)
        kernel = conv.weight[:keep, : features[-1].shape[1], :2, :2]
        features.append(F.conv2d(features[-1], kernel, stride=2))
    write_pairs(encoder.down_blocks[-1].resnets[0].conv_shortcut, latents, groups, constant)
    read_pairs(encoder.conv_out, latents, groups, constant, 1.0)
    carry(model.quant_conv)
    model.quant_conv.weight[latents:] = 0
    model.quant_conv.bias[latents:] = LOG_VARIANCE
    return features


def start_decoder(model: AutoencoderKL, features: list[torch.Tensor]) -> None:
    """Make each upsampling of the decoder the best estimate of the next finer features."""
    decoder, images = model.decoder, features[0]
    groups, constant = model.config.norm_num_groups, CONSTANTS[1]
    carry(model.post_quant_conv)
    carry(decoder.conv_in)
    latents = model.encode(images).latent_dist.sample()
    for block, targets in zip(decoder.up_blocks, features[-2::-1], strict=False):
        conv = block.upsamplers[0].conv
        carry(conv, first=targets.shape[1])
        fit(conv, input_of(conv, model, latents), targets)
    write_pairs(decoder.up_blocks[-1].resnets[0].conv_shortcut, 3, groups, constant)
    read_pairs(decoder.conv_out, 3, groups, constant, images.square().mean().item())


@torch.no_grad()
def linear_start(model: AutoencoderKL, images: torch.Tensor) -> None:
    """Set the weights of the model from `images`, a batch of training crops."""
    for name, module in model.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            module.weight *= QUIET
            module.bias.zero_()
        elif name.endswith(".conv_shortcut"):
            carry(module)
    start_decoder(model, start_encoder(model, images))
