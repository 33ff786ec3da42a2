"""The one table of shapes over which every kernel is tested and timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rbln_vae.graph.ir import Attention, Conv2d, Graph, Norm, Operation, RMSNorm, Value


@dataclass(frozen=True)
class ConvCase:
    """A convolution, with what is fused into it.

    With `upsample` each of 2x2 phases of the output has a kernel, and with `doubles` the image is
    doubled first. `groups` norms the input first, or `rms` each of its pixels; `activation` is
    then applied to it; `residual` adds a second convolution of the input; `output_activation` is
    applied to the sum; and `normed_after` norms the output, from the statistics that were summed
    while writing.
    """

    inputs: int
    outputs: int
    height: int
    width: int
    batch: int = 1
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    upsample: bool = False
    doubles: bool = False
    groups: int = 0
    rms: bool = False
    activation: str | None = None
    residual: bool = False
    output_activation: str | None = None
    normed_after: int = 0

    def graph(self) -> Graph:
        torch.manual_seed(self.inputs * 1000 + self.outputs)
        rows, columns = self.kernel
        weights: dict[str, torch.Tensor] = {}
        operations: list[Operation] = []

        def conv(
            output: Value,
            norm: Norm | RMSNorm | None = None,
            activation: str | None = None,
            residual: Value | None = None,
            output_activation: str | None = None,
        ) -> None:
            shape: tuple[int, ...] = (self.outputs, self.inputs, rows, columns)
            biases: tuple[int, ...] = (self.outputs,)
            if self.upsample:
                shape, biases = (2, 2, *shape), (2, 2, *biases)
            spread = (self.inputs * rows * columns) ** -0.5
            weights[f"{output}.weight"] = torch.randn(shape) * spread
            weights[f"{output}.bias"] = torch.randn(biases)
            operations.append(
                Conv2d(
                    output,
                    "x",
                    f"{output}.weight",
                    f"{output}.bias",
                    self.stride,
                    self.padding,
                    self.upsample or self.doubles,
                    norm,
                    activation,
                    residual,
                    output_activation,
                )
            )

        def norm(name: str, groups: int, channels: int) -> Norm:
            weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(channels)
            weights[f"{name}.bias"] = 0.2 * torch.randn(channels)
            return Norm(groups, 1e-6, f"{name}.weight", f"{name}.bias")

        before: Norm | RMSNorm | None = None
        if self.groups:
            before = norm("norm", self.groups, self.inputs)
        if self.rms:
            weights["gamma"] = 1 + 0.2 * torch.randn(self.inputs)
            before = RMSNorm(1e-24, "gamma")
        if self.residual:
            conv("r")
        residual = "r" if self.residual else None
        conv("y", before, self.activation, residual, self.output_activation)
        if self.normed_after:
            after = norm("after", self.normed_after, self.outputs)
            weights["z.weight"] = torch.randn(5, self.outputs, 1, 1) * self.outputs**-0.5
            operations.append(Conv2d("z", "y", "z.weight", None, norm=after))
        output = operations[-1].output
        return Graph("case", ("x",), self.inputs, (output,), tuple(operations), weights).verify()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.inputs, self.height, self.width)

    @property
    def suits_winograd(self) -> bool:
        return self.kernel == (3, 3) and self.stride <= 2 and not self.doubles


@dataclass(frozen=True)
class AttentionCase:
    """Attention of an image to itself, over three convolutions of it."""

    channels: int
    height: int
    width: int
    batch: int = 1
    heads: int = 1
    value_channels: int = 0
    residual: bool = True
    sharp: float = 1.0

    def graph(self) -> Graph:
        torch.manual_seed(self.channels)
        channels = self.channels
        values = self.value_channels or channels
        weights = {
            "q": torch.randn(channels, channels, 1, 1) * channels**-0.5 * self.sharp,
            "k": torch.randn(channels, channels, 1, 1) * channels**-0.5,
            "v": torch.randn(values, channels, 1, 1) * channels**-0.5,
        }
        projections = tuple(Conv2d(f"%{name}", "x", name, None) for name in weights)
        residual = "x" if self.residual and values == channels else None
        scale = (channels // self.heads) ** -0.5
        attention = Attention("y", "%q", "%k", "%v", self.heads, scale, residual)
        operations = (*projections, attention)
        return Graph("case", ("x",), channels, ("y",), operations, weights).verify()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, self.height, self.width)


_NONE = (0, 0, 0, 0)

CONVOLUTIONS = (
    # Channels that don't divide a block, and sizes that don't divide a product.
    ConvCase(3, 16, 17, 19),
    ConvCase(4, 24, 1, 1),
    ConvCase(16, 3, 5, 33),
    ConvCase(24, 40, 9, 14, groups=8, activation="silu"),
    ConvCase(40, 96, 7, 15, groups=8, activation="silu", residual=True),
    ConvCase(96, 24, 6, 31, groups=32, activation="silu", residual=True, normed_after=8),
    ConvCase(48, 48, 3, 3, groups=16, activation="gelu", normed_after=3),
    ConvCase(32, 64, 8, 47, groups=4, activation="mish", batch=2, normed_after=32),
    ConvCase(64, 32, 13, 64, groups=32, activation="relu", batch=3),
    ConvCase(64, 64, 2, 100, groups=1, normed_after=1),
    # Activations without a norm.
    ConvCase(24, 40, 9, 14, activation="silu"),
    ConvCase(33, 16, 13, 21, activation="relu", residual=True, normed_after=4),
    ConvCase(8, 40, 6, 7, kernel=(1, 1), padding=_NONE, activation="gelu", batch=2),
    ConvCase(24, 40, 8, 9, stride=2, padding=(0, 1, 0, 1), activation="mish"),
    ConvCase(64, 64, 17, 22, doubles=True, activation="silu"),
    # Other kernels, and one-sided padding.
    ConvCase(
        40, 33, 11, 13, kernel=(1, 1), padding=_NONE, groups=5, activation="silu", residual=True
    ),
    ConvCase(128, 128, 1, 1, kernel=(1, 1), padding=_NONE, normed_after=32),
    ConvCase(8, 8, 12, 10, kernel=(5, 5), padding=(2, 2, 2, 2)),
    ConvCase(8, 72, 12, 10, kernel=(3, 1), padding=(1, 1, 0, 0)),
    ConvCase(24, 40, 16, 18, stride=2, padding=(0, 1, 0, 1), normed_after=8),
    ConvCase(40, 24, 9, 41, stride=2, padding=_NONE),
    ConvCase(16, 16, 10, 11, stride=3),
    # Upsampling within the convolution.
    ConvCase(24, 40, 5, 7, doubles=True, normed_after=8),
    ConvCase(64, 64, 1, 1, doubles=True),
    ConvCase(32, 96, 9, 40, doubles=True, batch=2, normed_after=32),
    # A pixel shuffle within the convolution.
    ConvCase(24, 40, 5, 7, upsample=True, normed_after=8),
    ConvCase(40, 3, 13, 22, upsample=True, rms=True, activation="silu"),
    ConvCase(64, 64, 17, 9, upsample=True, residual=True, batch=2),
    # Norms of pixels.
    ConvCase(24, 40, 9, 14, rms=True, activation="silu"),
    ConvCase(96, 96, 23, 37, rms=True, activation="silu", residual=True, batch=2),
    ConvCase(33, 48, 6, 5, kernel=(1, 1), padding=_NONE, rms=True),
    ConvCase(40, 24, 17, 18, stride=2, padding=(0, 1, 0, 1), rms=True, activation="gelu"),
    # Activations of the output.
    ConvCase(24, 40, 9, 14, output_activation="relu"),
    ConvCase(64, 64, 19, 23, residual=True, output_activation="relu", normed_after=4),
    ConvCase(40, 33, 8, 9, output_activation="silu", activation="relu"),
    ConvCase(40, 24, 8, 9, doubles=True, output_activation="tanh"),
    # Padding that is none, and more than a kernel reaches.
    ConvCase(72, 40, 21, 45, padding=_NONE, groups=8, activation="silu"),
    ConvCase(33, 65, 18, 7, padding=(2, 3, 0, 1), normed_after=5),
    # Several tiles each way.
    ConvCase(64, 64, 130, 70, groups=32, activation="silu", residual=True, normed_after=32),
    ConvCase(256, 64, 40, 60, groups=32, activation="silu", normed_after=32),
    # So many channels that all are multiplied before any sum is transformed back.
    ConvCase(256, 128, 32, 32, groups=32, residual=True),
)

ATTENTIONS = (
    AttentionCase(32, 4, 4),
    AttentionCase(64, 1, 1),
    AttentionCase(40, 7, 9, batch=2),
    AttentionCase(48, 5, 5, heads=3),
    AttentionCase(24, 6, 11, heads=2, batch=2),
    AttentionCase(96, 19, 17, heads=1, sharp=6.0),
    AttentionCase(64, 17, 31, value_channels=24),
    AttentionCase(128, 12, 13, residual=False),
)

LAYERS = (
    # What Stable Diffusion's VAE is made of, on small images.
    ConvCase(4, 512, 32, 32, normed_after=32),
    ConvCase(512, 512, 32, 32, groups=32, residual=True),
    ConvCase(512, 512, 32, 32, doubles=True),
    ConvCase(512, 256, 64, 64, groups=32, normed_after=32),
    ConvCase(512, 256, 64, 64, kernel=(1, 1), padding=_NONE),
    ConvCase(256, 256, 64, 64, doubles=True),
    ConvCase(256, 128, 96, 96, groups=32),
    ConvCase(128, 128, 128, 128, groups=32, residual=True),
    ConvCase(128, 128, 128, 128, stride=2, padding=(0, 1, 0, 1)),
    ConvCase(128, 3, 128, 128, groups=32),
    # Of Qwen-Image's and Wan's, and of HunyuanImage's.
    ConvCase(96, 96, 128, 128, rms=True, activation="silu", residual=True),
    ConvCase(384, 384, 32, 32, rms=True, activation="silu"),
    ConvCase(512, 512, 32, 32, upsample=True),
    # Of TAESD.
    ConvCase(64, 64, 128, 128, residual=True, output_activation="relu"),
    AttentionCase(512, 32, 32),
)
