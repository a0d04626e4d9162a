"""The VAE and the IWAE of pythae around networks of ours, for the benchmarks that it takes part in.

It is no dependency of this project: install it beside it, `pip install pythae`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor, nn

SHAPE = (1, 28, 28)


def is_installed() -> bool:
    """Whether pythae can be imported."""
    return importlib.util.find_spec("pythae") is not None


def model(encoder: nn.Module, decoder: nn.Module, latent: int, num_samples: int = 1) -> Any:
    """pythae's `VAE`, or its `IWAE` of several samples, with a Bernoulli likelihood.

    Args:
        encoder: from rows of 784 to mean and log variance.
        decoder: from z to the logits of 784 pixels.
    """
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = encoder

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.network(x.reshape(len(x), -1)).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z).sigmoid().reshape(-1, *SHAPE))

    options = {"input_dim": SHAPE, "latent_dim": latent, "reconstruction_loss": "bce"}
    if num_samples == 1:
        return VAE(VAEConfig(**options), encoder=Encoder(), decoder=Decoder())
    config = IWAEConfig(**options, number_samples=num_samples)
    return IWAE(config, encoder=Encoder(), decoder=Decoder())


def images(x: Tensor) -> Tensor:
    """Rows of 784 as pythae takes them."""
    return x.reshape(-1, *SHAPE)
