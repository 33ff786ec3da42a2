"""The kinds of models, by the names that users give: what the shapes of weights don't tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_WAN_2_2_MEAN = """
-0.2289 -0.0052 -0.1323 -0.2339 -0.2799  0.0174  0.1838  0.1557 -0.1382  0.0542  0.2813  0.0891
 0.1570 -0.0098  0.0375 -0.1825 -0.2246 -0.1207 -0.0698  0.5109  0.2665 -0.2108 -0.2158  0.2502
-0.2055 -0.0322  0.1109  0.1567 -0.0729  0.0899 -0.2799 -0.1230 -0.0313 -0.1649  0.0117  0.0723
-0.2839 -0.2083 -0.0520  0.3748  0.0152  0.1957  0.1433 -0.2944  0.3573 -0.0548 -0.1681 -0.0667
"""
_WAN_2_2_STD = """
 0.4765  1.0364  0.4514  1.1677  0.5313  0.4990  0.4818  0.5013  0.8158  1.0344  0.5894  1.0901
 0.6885  0.6165  0.8454  0.4978  0.5759  0.3523  0.7135  0.6804  0.5833  1.4146  0.8986  0.5659
 0.7069  0.5338  0.4889  0.4917  0.4069  0.4999  0.6866  0.4093  0.5709  0.6065  0.6415  0.4944
 0.5726  1.2042  0.5458  1.6887  0.3971  1.0600  0.3943  0.5537  0.5444  0.4089  0.7468  0.7744
"""


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split()]


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        class_names: The diffusers classes of its autoencoders.
        latent_channels: Channels of their latents; `None` if they differ.
        config: What shapes don't tell, as in the published configurations. What isn't here is
            the default of the class.
    """

    class_names: tuple[str, ...]
    latent_channels: int | None
    config: Mapping[str, Any] = field(default_factory=dict)

    def suits(self, class_name: str, latent_channels: int | None) -> bool:
        """Whether a model of this class and with these latents can be of this kind."""
        return class_name in self.class_names and (
            latent_channels is None or self.latent_channels in (None, latent_channels)
        )


_FLUX = Kind(
    ("AutoencoderKL",),
    16,
    {
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "force_upcast": True,
        "sample_size": 1024,
    },
)

KINDS: Mapping[str, Kind] = {
    "sd": Kind(
        ("AutoencoderKL", "AsymmetricAutoencoderKL"),
        4,
        {"scaling_factor": 0.18215, "sample_size": 512},
    ),
    "sdxl": Kind(
        ("AutoencoderKL",),
        4,
        {"scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024},
    ),
    "sd3": Kind(
        ("AutoencoderKL",),
        16,
        {
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "force_upcast": True,
            "sample_size": 1024,
        },
    ),
    "flux": _FLUX,
    "z-image": _FLUX,
    "flux2": Kind(("AutoencoderKLFlux2",), 32, {"sample_size": 1024}),
    "qwen-image": Kind(("AutoencoderKLQwenImage",), 16),
    "qwen-image-2.1": Kind(("AutoencoderKLQwenImage21",), 64),
    "wan": Kind(("AutoencoderKLWan",), 16),
    "wan2.2": Kind(
        ("AutoencoderKLWan",),
        48,
        {"latents_mean": _numbers(_WAN_2_2_MEAN), "latents_std": _numbers(_WAN_2_2_STD)},
    ),
    "hunyuan-image": Kind(
        ("AutoencoderKLHunyuanImage",), 64, {"scaling_factor": 0.75289, "sample_size": 384}
    ),
    "taesd": Kind(("AutoencoderTiny",), None),
}
"""Every kind by its name. Wan 2.2's 14B models have the autoencoder of Wan 2.1: `wan`."""


def find_kind(name: str) -> Kind:
    """The kind of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in KINDS:
        raise ValueError(f"kind={name!r} is not known. Known are {', '.join(KINDS)}.")
    return KINDS[name]
