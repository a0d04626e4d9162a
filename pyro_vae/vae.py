"""A variational autoencoder: three conditional distributions, as a Pyro model and guide."""

from __future__ import annotations

import uuid
import weakref
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.params.param_store import param_with_module_name
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from pyro_vae.conditioning import call, condition
from pyro_vae.errors import ParameterStoreError, ShapeError
from pyro_vae.likelihoods import check_finite
from pyro_vae.programs import evaluating
from pyro_vae.seeding import seeded
from pyro_vae.typing import Conditional, Distribution


class Generative(nn.Module):
    """Base of the models here: a `model` that draws latent variables and then x, and a `guide`.

    Attributes:
        model: a program of `(x, context)` with a site `"x"` and a part `likelihood` that it is
            drawn from.
        guide: a program of the same arguments.
    """

    model: Any
    guide: Any

    @property
    def likelihood(self) -> Any:
        """The module (or callable) that x is drawn from."""
        return self.model.likelihood

    @torch.no_grad()
    def generate(
        self, num_samples: int, context: Tensor | None = None, seed: int | None = None
    ) -> Distribution:
        """p(x|z) at `num_samples` draws of the latent variables: batch shape `(num_samples,)`.

        The result's `.mean` is E[x|z], its `.sample()` draws x: two different pictures. The model
        runs in evaluation mode.

        Args:
            context: `(num_samples, ...)` where the model takes one.
            seed: of the draws; None uses and advances torch's global generator.

        Raises:
            ShapeError: the context is not of `num_samples` rows.
        """
        if context is not None and len(context) != num_samples:
            raise ShapeError(
                f"{num_samples} samples need a context of as many rows, "
                f"got one of shape {tuple(context.shape)}"
            )
        nothing = torch.empty(num_samples, 0)  # only its length matters where x is drawn
        with (
            evaluating(self.model),
            seeded(seed),
            pyro.validation_enabled(False),
            poutine.trace() as tracer,
        ):
            self._run_model(nothing, context)
        return tracer.trace.nodes["x"]["fn"]

    def _run_model(self, x: Tensor, context: Tensor | None) -> None:
        """Run the model as it is, given the context, to generate."""
        call(self.model, x, context=context)

    def check(self, x: Tensor) -> None:
        """Raise unless the likelihood can take `x`, `(N, features)`: finite and in the support.

        Raises:
            DataError, SupportError: see `Likelihood.check`.
        """
        getattr(self.likelihood, "check", check_finite)(x)


class VAE(Generative):
    """Pairs a model p(z) p(x|z) with a guide q(z|x) (Kingma & Welling 2013).

    Model and guide are `nn.Module`s with sites `"z"` and `"x"` in the plate `"data"`; each is
    called with data `x` of shape `(N, features)` and, where the parts take one, a `context` of
    shape `(N, ...)`; a part that takes none is called without. They go to `SVI(vae.model,
    vae.guide, ...)`, to any `ELBO()(vae.model, vae.guide)`, and to every tool of this library. Give
    the context by position, `svi.step(x, context)`: Pyro's handlers take the keyword for their own.

    Args:
        prior: returns p(z), event shape `(latent,)`: a module or any callable (not a distribution
            itself: give `lambda: p`).
        likelihood: maps z to p(x|z).
        posterior: maps x to q(z|x).
        name: prefix of the parameters in Pyro's store. By default it is unique to this object
            (a copy gets one of its own), so that two VAEs in one process never share parameters
            by accident; give one to find the same names in another process (`pyro.optim` states,
            saved stores).

    Raises:
        ConfigError: when run, where a part returns no distribution of Pyro's.
        ParameterStoreError: when run, where the store holds another tensor under a given `name`:
            that of another VAE (or of the original of a copy), or one loaded from disk.
    """

    def __init__(
        self,
        prior: Conditional,
        likelihood: Conditional,
        posterior: Conditional,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.model = Model(prior, likelihood, name and f"{name}.model")
        self.guide = Guide(posterior, name and f"{name}.guide")

    @property
    def prior(self) -> Any:
        """The module (or callable) of p(z)."""
        return self.model.prior

    @property
    def posterior(self) -> Any:
        """The module (or callable) of q(z|x)."""
        return self.guide.posterior

    def encode(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        """q(z|x): batch shape `x.shape[:-1]`, event shape `(latent,)`."""
        return condition(self.posterior, x, context=context)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x|z): batch shape `z.shape[:-1]`, event shape `(features,)`."""
        return condition(self.likelihood, z, context=context)

    def check_shape(self, x: Tensor, context: Tensor | None = None) -> None:
        """Raise `ShapeError` unless the three parts fit each other and a datum like those of `x`.

        The parts are run once, in evaluation mode, on the first row; torch's generators and the
        modules' modes are as before afterwards.
        """
        row = None if context is None else context[:1]
        with torch.no_grad(), seeded(0), evaluating(self):
            prior = condition(self.prior, context=row)
            q = self.encode(x[:1], row)
            if q.event_shape != prior.event_shape:
                raise ShapeError(
                    f"the posterior is over latent vectors of shape {tuple(q.event_shape)}, "
                    f"the prior over {tuple(prior.event_shape)}"
                )
            p = self.decode(q.sample(), row)
        if p.event_shape != x.shape[1:]:
            raise ShapeError(
                f"the likelihood is over data of shape {tuple(p.event_shape)}, "
                f"got data of shape {tuple(x.shape[1:])} a row"
            )


class ProgramModule(nn.Module):
    """Base of Pyro programs that are modules: their parameters are known to Pyro under a name of
    their own, once `forward` has called `_register`."""

    def __init__(self, name: str | None) -> None:
        super().__init__()
        self._name = name
        self._unique_name = _unique_name(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copy has parameters of its own, so it needs a name of its own in the store
        super().__setstate__(state)
        self._unique_name = _unique_name(self)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro leaves a weak reference on every parameter that it has seen; none can be pickled
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        return self.__dict__.copy()

    def _register(self) -> None:
        """Tell Pyro of every parameter, so that SVI and the effect handlers find them.

        The store holds the module's own parameters, never copies: what SVI moves is what the
        network computes with. (`pyro.module` leaves a stale tensor in the store where a parameter
        was replaced, and a copy where one is not contiguous; SVI would move those instead.)
        """
        local = pyro.settings.get("module_local_params")
        for key, parameter in self.named_parameters():
            if parameter.requires_grad:
                full = param_with_module_name(self._name or self._unique_name, key)
                # within torch.func.functional_call the module holds tensors that are not its own
                if not local and isinstance(parameter, nn.Parameter):
                    self._store(full, parameter)
                _announce(full, parameter)

    def _store(self, full: str, parameter: nn.Parameter) -> None:
        store = pyro.get_param_store()
        held = store._params.get(full)
        if held is parameter:
            return
        if held is not None and self._name is not None:
            raise ParameterStoreError(
                f'Pyro\'s parameter store holds another tensor under "{full}". If it belongs to '
                "another module, name this one differently or call pyro.clear_param_store() "
                "first; if it was loaded from disk, take it over with "
                f'pyro.module("{self._name}", ..., update_module_params=True)'
            )
        store._constraints[full] = constraints.real
        store._params[full] = parameter
        store._param_to_name[parameter] = full


class Model(ProgramModule):
    """The Pyro model: z ~ p(z), x ~ p(x|z), for every datum in the plate "data"."""

    def __init__(self, prior: Conditional, likelihood: Conditional, name: str | None) -> None:
        super().__init__(name)
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Run the model with data `x`, `(N, features)`, observed; returns z."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", condition(self.prior, context=context))
            pyro.sample("x", condition(self.likelihood, z, context=context), obs=x)
        return z


class Guide(ProgramModule):
    """The Pyro guide: z ~ q(z|x), for every datum in the plate "data"."""

    def __init__(self, posterior: Conditional, name: str | None) -> None:
        super().__init__(name)
        self.posterior = posterior

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Run the guide on data `x`, `(N, features)`; returns z."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", condition(self.posterior, x, context=context))


def _announce(full: str, parameter: Tensor) -> None:
    """Send the param message that a PyroModule sends: handlers see it, the store does not."""
    parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    effectful(type="param")(lambda *_, **__: parameter)(
        full, parameter, constraint=constraints.real, name=full
    )


def _unique_name(program: nn.Module) -> str:
    return f"{type(program).__name__.lower()}-{uuid.uuid4().hex[:12]}"
