"""Variational autoencoders for people who write Pyro."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_vae import (
    distributions,
    errors,
    likelihoods,
    networks,
    posteriors,
    priors,
    schedules,
)
from pyro_vae.data import Data, Split
from pyro_vae.objectives import ELBO, IWAE, MIWAE, WakeSleep
from pyro_vae.vae import VAE

if TYPE_CHECKING:
    from pyro_vae import (
        compiled,
        datasets,
        evidence,
        imputation,
        inference_data,
        plots,
        training,
        variants,
    )
    from pyro_vae.compiled import CompiledSVI, compile
    from pyro_vae.diagnostics import active_units, clustering_accuracy
    from pyro_vae.evidence import Evidence, compare, exact, log_marginal, sandwich
    from pyro_vae.gaps import Gaps, inference_gaps
    from pyro_vae.imputation import Imputations, impute
    from pyro_vae.mcmc import Chains, nuts
    from pyro_vae.monte_carlo_em import mcem
    from pyro_vae.training import Run, fit, load_weights, read_metrics, save_weights, track_log_px

    __version__: str

__all__ = [
    "ELBO",
    "IWAE",
    "MIWAE",
    "VAE",
    "Chains",
    "CompiledSVI",
    "Data",
    "Evidence",
    "Gaps",
    "Imputations",
    "Run",
    "Split",
    "WakeSleep",
    "active_units",
    "clustering_accuracy",
    "compare",
    "compile",
    "compiled",
    "datasets",
    "distributions",
    "errors",
    "evidence",
    "exact",
    "fit",
    "imputation",
    "impute",
    "inference_data",
    "inference_gaps",
    "likelihoods",
    "load_weights",
    "log_marginal",
    "mcem",
    "networks",
    "nuts",
    "plots",
    "posteriors",
    "priors",
    "read_metrics",
    "sandwich",
    "save_weights",
    "schedules",
    "track_log_px",
    "training",
    "variants",
]

# loaded at first use, so that `import pyro_vae` costs little more than `import pyro`
_HOMES = {
    "CompiledSVI": "pyro_vae.compiled",
    "active_units": "pyro_vae.diagnostics",
    "clustering_accuracy": "pyro_vae.diagnostics",
    "compile": "pyro_vae.compiled",
    "Evidence": "pyro_vae.evidence",
    "compare": "pyro_vae.evidence",
    "exact": "pyro_vae.evidence",
    "Chains": "pyro_vae.mcmc",
    "Gaps": "pyro_vae.gaps",
    "Imputations": "pyro_vae.imputation",
    "Run": "pyro_vae.training",
    "fit": "pyro_vae.training",
    "impute": "pyro_vae.imputation",
    "inference_gaps": "pyro_vae.gaps",
    "load_weights": "pyro_vae.training",
    "log_marginal": "pyro_vae.evidence",
    "mcem": "pyro_vae.monte_carlo_em",
    "nuts": "pyro_vae.mcmc",
    "read_metrics": "pyro_vae.training",
    "sandwich": "pyro_vae.evidence",
    "save_weights": "pyro_vae.training",
    "track_log_px": "pyro_vae.training",
}
_MODULES = (
    "compiled",
    "datasets",
    "evidence",
    "imputation",
    "inference_data",
    "plots",
    "training",
    "variants",
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name == "__version__":
        return import_module("pyro_vae.provenance").version_of("pyro-vae")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
