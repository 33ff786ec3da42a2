"""Runs a Graph with plain PyTorch: the reference for every target, and the target `reference`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import singledispatchmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from .ir import (
    Activation,
    Add,
    Attention,
    Conv2d,
    Graph,
    GroupNorm,
    Identity,
    Modulate,
    Norm,
    Operation,
    Pad,
    PixelNorm,
    RMSNorm,
    Scale,
    Shuffle,
    Stack,
    Unstack,
    Upsample,
    Value,
)

OnOperation = Callable[[int, Operation], None]

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "relu": F.relu,
    "tanh": torch.tanh,
}


class Interpreter:
    """A graph with its weights on one device and in one dtype, ready to run.

    Several threads may run one interpreter at the same time.

    Args:
        graph: The graph.
        dtype: The dtype of the computation, by default float32. Statistics of norms and sums
            of products are float32 or better with every dtype.
        device: The device of the computation, by default the CPU.
    """

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.graph = graph
        self.dtype = dtype
        self.device = torch.device(device)
        self._last_use = graph.last_uses()
        self._weights = {
            name: _fast_layout(weight.to(self.device, dtype))
            for name, weight in graph.weights.items()
        }
        self._phases = {
            operation.weight: _phases(graph.weights[operation.weight]).to(self.device, dtype)
            for operation in graph.operations
            if isinstance(operation, Conv2d) and operation.doubles(graph.weights)
        }

    @torch.no_grad()
    def run(self, image: Tensor, before: OnOperation | None = None) -> Tensor:
        """Run the graph.

        Args:
            image: `(N, input_channels, H, W)`, any floating dtype, device and strides.
            before: Called before each operation, with its index and the operation. An
                exception from it ends the run.

        Returns:
            A new contiguous tensor in the interpreter's dtype and on its device.

        Raises:
            GraphError: The image does not fit the graph.
        """
        (result,), _ = self.evaluate([image], before=before)
        # The caller may write to the result, so it must not be the caller's own image.
        return result.clone() if result.data_ptr() == image.data_ptr() else result

    @torch.no_grad()
    def evaluate(
        self,
        inputs: Sequence[Tensor],
        state: Mapping[str, Tensor] | None = None,
        before: OnOperation | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run the graph once, as a part of a video.

        Args:
            inputs: One image for each input, as of `run`.
            state: What the run before has left, by the names of slots; by default nothing.
            before: As of `run`.

        Returns:
            The outputs, contiguous, and what is left for the next run.

        Raises:
            GraphError: An image does not fit the graph.
        """
        graph = self.graph
        graph.infer_shapes(inputs[0].shape)
        given = dict(zip(graph.inputs, inputs, strict=True))
        given |= {s.read: (state or {})[s.name] for s in graph.state if s.read is not None}
        values = {
            name: _fast_layout(image.to(self.device, self.dtype)) for name, image in given.items()
        }
        zeros: dict[str, Tensor] = {}
        for index, operation in enumerate(self.graph.operations):
            if before is not None:
                before(index, operation)
            values[operation.output] = self._evaluate(operation, values)
            zeros |= {
                slot.name: torch.zeros_like(values[slot.left])
                for slot in graph.state
                if slot.zeros and slot.left in values and slot.name not in zeros
            }
            for value in {*operation.inputs, *graph.given, operation.output}:
                if self._last_use.get(value, index) <= index:
                    values.pop(value, None)
        left = {slot.name: values[slot.left] for slot in graph.state if not slot.zeros}
        return [values[name].contiguous() for name in graph.outputs], left | zeros

    @singledispatchmethod
    def _evaluate(self, operation: Operation, values: Mapping[Value, Tensor]) -> Tensor:
        raise NotImplementedError(f"no rule for {operation.kind}")

    @_evaluate.register
    def _(self, operation: Conv2d, values: Mapping[Value, Tensor]) -> Tensor:
        *earlier, image = (
            self._read(operation, values[name]) for name in (*operation.earlier, operation.input)
        )
        if earlier:
            image = with_earlier(image, earlier)
        if operation.over_clip:
            image = with_neighbours(image)
        weight = self._weights[operation.weight]
        if operation.left_out:
            weight = weight[..., -image.shape[1] :, :, :]
        bias = None if operation.bias is None else self._weights[operation.bias]
        if operation.upsample:
            doubles = operation.doubles(self._weights)
            phases = self._phases[operation.weight] if doubles else weight
            result = _upsampled_convolution(image, phases, bias)
        else:
            above, below, left, right = operation.padding
            if above == below and left == right:
                result = F.conv2d(image, weight, bias, operation.stride, (above, left))
            else:
                padded = F.pad(image, (left, right, above, below))
                result = F.conv2d(padded, weight, bias, operation.stride)
        if operation.residual is not None:
            result = result + values[operation.residual]
        if operation.output_activation is not None:
            result = _ACTIVATIONS[operation.output_activation](result)
        return result

    def _read(self, operation: Conv2d, image: Tensor) -> Tensor:
        """An image with the norm and the activation of a convolution applied."""
        if operation.norm is not None:
            image = self._normalise(image, operation.norm)
        if operation.activation is not None:
            image = _ACTIVATIONS[operation.activation](image)
        return image.to(self.dtype)  # round once after norm and activation, not after each

    @_evaluate.register
    def _(self, operation: PixelNorm, values: Mapping[Value, Tensor]) -> Tensor:
        return self._normalise(values[operation.input], operation.norm).to(self.dtype)

    @_evaluate.register
    def _(self, operation: GroupNorm, values: Mapping[Value, Tensor]) -> Tensor:
        return self._normalise(values[operation.input], operation.norm).to(self.dtype)

    @_evaluate.register
    def _(self, operation: Activation, values: Mapping[Value, Tensor]) -> Tensor:
        return _ACTIVATIONS[operation.function](values[operation.input])

    @_evaluate.register
    def _(self, operation: Add, values: Mapping[Value, Tensor]) -> Tensor:
        return values[operation.left] + values[operation.right]

    @_evaluate.register
    def _(self, operation: Scale, values: Mapping[Value, Tensor]) -> Tensor:
        return values[operation.input] * operation.factor + operation.offset

    @_evaluate.register
    def _(self, operation: Modulate, values: Mapping[Value, Tensor]) -> Tensor:
        image = values[operation.input]
        if operation.norm is not None:
            image = self._normalise(image, operation.norm)
        factor = image.shape[2] // values[operation.scale].shape[2]
        result = image * _enlarged(values[operation.scale], factor)
        if operation.shift is not None:
            result = result + _enlarged(values[operation.shift], factor)
        return result.to(self.dtype)

    @_evaluate.register
    def _(self, operation: Identity, values: Mapping[Value, Tensor]) -> Tensor:
        return values[operation.input]

    @_evaluate.register
    def _(self, operation: Upsample, values: Mapping[Value, Tensor]) -> Tensor:
        return F.interpolate(values[operation.input], scale_factor=2.0, mode="nearest")

    @_evaluate.register
    def _(self, operation: Shuffle, values: Mapping[Value, Tensor]) -> Tensor:
        image = values[operation.input]
        if operation.way == "down":
            image = F.pixel_unshuffle(image, 2)
        image = image[:, list(operation.order)]
        return F.pixel_shuffle(image, 2) if operation.way == "up" else image

    @_evaluate.register
    def _(self, operation: Stack, values: Mapping[Value, Tensor]) -> Tensor:
        return torch.cat([values[frame] for frame in operation.frames])

    @_evaluate.register
    def _(self, operation: Unstack, values: Mapping[Value, Tensor]) -> Tensor:
        return values[operation.input].chunk(operation.count)[operation.index]

    @_evaluate.register
    def _(self, operation: Pad, values: Mapping[Value, Tensor]) -> Tensor:
        above, below, left, right = operation.padding
        return F.pad(values[operation.input], (left, right, above, below))

    @_evaluate.register
    def _(self, operation: Attention, values: Mapping[Value, Tensor]) -> Tensor:
        query, key, value = (
            _pixels_by_head(values[v], operation.heads)
            for v in (operation.query, operation.key, operation.value)
        )
        result = F.scaled_dot_product_attention(query, key, value, scale=operation.scale)
        image = result.transpose(2, 3).reshape(values[operation.value].shape)
        return image if operation.residual is None else image + values[operation.residual]

    def _normalise(self, image: Tensor, norm: Norm | RMSNorm) -> Tensor:
        """Normalise an image, in float32."""
        if isinstance(norm, RMSNorm):
            weight = self._weights[norm.weight].float()
            pixels = image.float().movedim(1, 3)
            return F.rms_norm(pixels, weight.shape, weight, norm.eps).movedim(3, 1)
        weight, bias = self._weights[norm.weight].float(), self._weights[norm.bias].float()
        if norm.over_clip:
            clip = image.float().transpose(0, 1).unsqueeze(0)
            normalised = F.group_norm(clip, norm.groups, weight, bias, norm.eps)
            return normalised.squeeze(0).transpose(0, 1)
        return F.group_norm(image.float(), norm.groups, weight, bias, norm.eps)


def run_video(
    graph: Graph, frames: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Run a part on the frames of a video.

    Args:
        graph: With state.
        frames: `(N, input_channels, H, W)` each: one, and then as many as whole runs take.
        dtype: As of `Interpreter`.

    Yields:
        The results, in order.

    Raises:
        GraphError: A frame does not fit the graph.
    """
    size = len(graph.inputs)
    later = Interpreter(graph, dtype)
    results, state = Interpreter(graph.start, dtype).evaluate(frames[:1])
    yield from results
    for begin in itertools.count(1, size):
        if begin >= len(frames):
            return
        results, state = later.evaluate(frames[begin : begin + size], state)
        yield from results


def _fast_layout(tensor: Tensor) -> Tensor:
    """A tensor of four axes in channels-last layout, in which torch convolves faster."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def with_neighbours(clip: Tensor) -> Tensor:
    """The frames of a clip with the channels of the frame before, their own, and of the one after.

    Where there is no frame, they are zeros.
    """
    frames, channels, height, width = clip.shape
    result = torch.empty(
        (frames, 3 * channels, height, width),
        dtype=clip.dtype,
        device=clip.device,
        memory_format=torch.channels_last,
    ).zero_()
    before, own, after = result.chunk(3, 1)
    before[1:].copy_(clip[:-1])
    own.copy_(clip)
    after[:-1].copy_(clip[1:])
    return result


def with_earlier(stack: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """A stack of frames, each with the channels of the frames before it, and then its own.

    Args:
        stack: `(frames * N, C, H, W)`, one frame after the other.
        earlier: The frames before these, `(N, C, H, W)` each: as many as stand before each.
    """
    taps, count = len(earlier) + 1, len(stack) // len(earlier[0])
    frames = [*earlier, *stack.chunk(count)]
    images, channels, height, width = stack.shape
    result = torch.empty(
        (images, taps * channels, height, width),
        dtype=stack.dtype,
        device=stack.device,
        memory_format=torch.channels_last,
    )
    for index, found in enumerate(result.chunk(count)):
        for part, frame in zip(found.chunk(taps, 1), frames[index:], strict=False):
            part.copy_(frame)
    return result


def _enlarged(image: Tensor, factor: int) -> Tensor:
    """An image enlarged by nearest neighbour."""
    return image.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def _pixels_by_head(image: Tensor, heads: int) -> Tensor:
    """An image `(N, C, H, W)` as `(N, heads, H * W, C / heads)`."""
    return image.reshape(image.shape[0], heads, image.shape[1] // heads, -1).transpose(2, 3)


def _phases(weight: Tensor) -> Tensor:
    """Turn a kernel `(out, in, 3, 3)` into `(row phase, column phase, out, in, 2, 2)`.

    An even row 2i reads rows 2i-1, 2i and 2i+1 of the doubled image, which are rows i-1, i
    and i of the small image. An odd row 2i+1 reads rows i, i and i+1 of the small image.
    """
    gather = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64
    )  # (phase, small tap, tap)
    phases = torch.einsum("oikl,pak,qbl->pqoiab", weight.double(), gather, gather)
    return phases.float().contiguous()


def _upsampled_convolution(image: Tensor, phases: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of a small image by a kernel for each of 2x2 phases of the result."""
    batch, _, height, width = image.shape
    centred = phases.shape[4] == 3
    result = image.new_empty((batch, phases.shape[2], 2 * height, 2 * width)).contiguous(
        memory_format=torch.channels_last
    )
    for row in (0, 1):
        for column in (0, 1):
            padding = (1, 1, 1, 1) if centred else (1 - column, column, 1 - row, row)
            weight = _fast_layout(phases[row, column])
            own = bias[row, column] if centred and bias is not None else bias
            result[:, :, row::2, column::2] = F.conv2d(F.pad(image, padding), weight, own)
    return result
