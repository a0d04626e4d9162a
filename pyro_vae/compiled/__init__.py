"""Any objective of any Pyro (model, guide) as one traced and fused graph."""

from pyro_vae.compiled.module import CompiledLoss, compile, terms
from pyro_vae.compiled.svi import CompiledSVI

__all__ = ["CompiledLoss", "CompiledSVI", "compile", "terms"]
