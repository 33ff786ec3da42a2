"""Compile a diffusers `AutoencoderKL` once; save, load, encode and decode with it anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import (
    RBLNAsymmetricAutoencoderKLConfig,
    RBLNAutoConfig,
    RBLNAutoencoderKLConfig,
    RBLNAutoencoderKLFlux2Config,
    RBLNAutoencoderKLHunyuanImageConfig,
    RBLNAutoencoderKLQwenImage21Config,
    RBLNAutoencoderKLQwenImageConfig,
    RBLNAutoencoderKLTemporalDecoderConfig,
    RBLNAutoencoderKLWanConfig,
    RBLNAutoencoderTinyConfig,
    RBLNModelConfig,
    RBLNVQModelConfig,
)
from .demo import demo_model
from .errors import (
    RBLNArtifactError,
    RBLNCancelledError,
    RBLNCompileError,
    RBLNDatasetError,
    RBLNError,
    RBLNRuntimeError,
    RBLNTargetUnavailableError,
)
from .lazy import lazy_names
from .registration import register
from .version import __version__

if TYPE_CHECKING:
    from .models.asymmetric_autoencoder_kl import RBLNAsymmetricAutoencoderKL
    from .models.auto import RBLNAutoencoder
    from .models.autoencoder_kl import RBLNAutoencoderKL
    from .models.autoencoder_kl_flux2 import RBLNAutoencoderKLFlux2
    from .models.autoencoder_kl_hunyuan_image import RBLNAutoencoderKLHunyuanImage
    from .models.autoencoder_kl_qwenimage import RBLNAutoencoderKLQwenImage
    from .models.autoencoder_kl_qwenimage21 import RBLNAutoencoderKLQwenImage21
    from .models.autoencoder_kl_temporal_decoder import RBLNAutoencoderKLTemporalDecoder
    from .models.autoencoder_kl_wan import RBLNAutoencoderKLWan
    from .models.autoencoder_tiny import RBLNAutoencoderTiny
    from .models.base import RBLNModel
    from .models.pipelines import compile_pipeline
    from .models.vq_model import RBLNVQModel

__all__ = [
    "RBLNArtifactError",
    "RBLNAsymmetricAutoencoderKL",
    "RBLNAsymmetricAutoencoderKLConfig",
    "RBLNAutoConfig",
    "RBLNAutoencoder",
    "RBLNAutoencoderKL",
    "RBLNAutoencoderKLConfig",
    "RBLNAutoencoderKLFlux2",
    "RBLNAutoencoderKLFlux2Config",
    "RBLNAutoencoderKLHunyuanImage",
    "RBLNAutoencoderKLHunyuanImageConfig",
    "RBLNAutoencoderKLQwenImage",
    "RBLNAutoencoderKLQwenImage21",
    "RBLNAutoencoderKLQwenImage21Config",
    "RBLNAutoencoderKLQwenImageConfig",
    "RBLNAutoencoderKLTemporalDecoder",
    "RBLNAutoencoderKLTemporalDecoderConfig",
    "RBLNAutoencoderKLWan",
    "RBLNAutoencoderKLWanConfig",
    "RBLNAutoencoderTiny",
    "RBLNAutoencoderTinyConfig",
    "RBLNCancelledError",
    "RBLNCompileError",
    "RBLNDatasetError",
    "RBLNError",
    "RBLNModel",
    "RBLNModelConfig",
    "RBLNRuntimeError",
    "RBLNTargetUnavailableError",
    "RBLNVQModel",
    "RBLNVQModelConfig",
    "__version__",
    "compile_pipeline",
    "demo_model",
]

register()

# torch takes a second or two to import.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".models.auto": ("RBLNAutoencoder",),
        ".models.autoencoder_kl": ("RBLNAutoencoderKL",),
        ".models.autoencoder_kl_flux2": ("RBLNAutoencoderKLFlux2",),
        ".models.autoencoder_kl_qwenimage": ("RBLNAutoencoderKLQwenImage",),
        ".models.autoencoder_kl_wan": ("RBLNAutoencoderKLWan",),
        ".models.autoencoder_kl_hunyuan_image": ("RBLNAutoencoderKLHunyuanImage",),
        ".models.autoencoder_kl_qwenimage21": ("RBLNAutoencoderKLQwenImage21",),
        ".models.autoencoder_kl_temporal_decoder": ("RBLNAutoencoderKLTemporalDecoder",),
        ".models.autoencoder_tiny": ("RBLNAutoencoderTiny",),
        ".models.asymmetric_autoencoder_kl": ("RBLNAsymmetricAutoencoderKL",),
        ".models.base": ("RBLNModel",),
        ".models.pipelines": ("compile_pipeline",),
        ".models.vq_model": ("RBLNVQModel",),
    },
)
