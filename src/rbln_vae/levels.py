"""The levels of pictures, bytes from 0 to 255, and the samples from -1 to 1 that they show.

Conversions are those of diffusers' `VaeImageProcessor`, bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def levels_of(sample: Tensor) -> Tensor:
    """The levels that show a sample: uint8, in its shape and on its device.

    Values beyond -1 and 1 are clamped, halves are rounded to even, and a NaN becomes 0.

    Args:
        sample: Of any floating dtype, in which all but the last steps are computed.

    Example:
        >>> levels_of(torch.tensor([-1.0, 0.0, 1.5]))
        tensor([  0, 128, 255], dtype=torch.uint8)
    """
    shown = (sample * 0.5).add_(0.5).clamp_(0, 1)
    return shown.float().mul_(255).round_().nan_to_num_(0).to(torch.uint8)


def sample_of(levels: Tensor) -> Tensor:
    """The sample that levels show: float32 in `[-1, 1]`, in their shape and on their device.

    Args:
        levels: uint8.

    Example:
        >>> sample_of(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    # Torch multiplies by the reciprocal of a number on a GPU, which isn't the quotient.
    white = torch.tensor(255.0, dtype=torch.float32, device=levels.device)
    return levels.float().div_(white).mul_(2).sub_(1)
