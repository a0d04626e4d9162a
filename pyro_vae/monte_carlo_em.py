"""`mcem`: EM by Monte Carlo, a model trained without any guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pyro_vae import hamiltonian, programs
from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError, NonFiniteError, SiteError
from pyro_vae.evidence.ground import prepare
from pyro_vae.evidence.sites import check_support, explained
from pyro_vae.hamiltonian import is_real
from pyro_vae.programs import Pair, Site
from pyro_vae.seeding import seeded
from pyro_vae.typing import Program

Draws = dict[str, Tensor]
ADAPTATION = 0.5  # of the logarithm of the step size, per unit of acceptance


def mcem(
    model: Program,
    x: Any,
    *args: Any,
    epochs: int = 10,
    batch_size: int = 100,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = Adam,
    num_leapfrog: int = 10,
    num_updates: int = 5,
    target_accept: float = 0.9,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Maximise log p(x) over the model's parameters by Monte Carlo EM (Wei & Tanner 1990).

    As Kingma & Welling 2013 (sec. 5, appendix D) compare with it: for each batch, one Hamiltonian
    transition of every datum's z towards p(z|x) (E), then `num_updates` gradient steps on
    log p(x, z) at that z (M). Every datum keeps its z between visits, which begins at a draw of
    the prior; so the chains lag behind the parameters, and a visit costs `num_leapfrog` gradients
    of the decoder. The step size is one for all data, adapted to the acceptance.

    Args:
        model: of `x` and `args`, in one plate as long as `x`, made of modules; its latent sites
            real.
        x: data `(N, ...)`.
        args: further arguments; tensors of length N are taken by row.
        epochs, batch_size: visits of every datum, and data visited at once.
        optimizer: makes one of torch's from the parameters.
        num_leapfrog, num_updates, target_accept: 10, 5 and 0.9 in the paper.
        seed: of the draws and the order; the generators are as before afterwards.

    Returns:
        A row an epoch: `log_joint`, the mean of log p(x, z) in nats, `acceptance`, `step_size`.

    Raises:
        ConfigError: a number is too small, or the model has no parameters.
        DataError, SupportError: the model does not run on `x`, or gives it no density.
        SiteError: a latent site is not real, or not one for each row in one plate.
        NonFiniteError: log p(x, z) is not finite at an update.
    """
    numbers = {"epochs": epochs, "batch_size": batch_size, "num_leapfrog": num_leapfrog,
               "num_updates": num_updates}  # fmt: skip
    for name, number in numbers.items():
        at_least(name, number, 1)
    if not 0 < target_accept < 1:
        raise ConfigError(f"target_accept lies between 0 and 1, got {target_accept}")
    x, args = prepare(model, model, x, args)
    with seeded(seed), pyro.get_param_store().scope(), pyro.validation_enabled(False):
        joint = _Joint(model, x, args)
        z = joint.from_prior()
        modules = programs.modules_of(model)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise ConfigError("the model has no parameters to train")
        opt, log_step, history = optimizer(parameters), math.log(0.1), []
        for epoch in range(1, epochs + 1):
            sums = torch.zeros(2, dtype=torch.float64)
            for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
                part = {name: value[rows] for name, value in z.items()}
                part, accepted = joint.transition(rows, part, math.exp(log_step), num_leapfrog)
                log_step += ADAPTATION * (accepted - target_accept)
                for name, value in part.items():
                    z[name][rows] = value
                found = [_update(joint, rows, part, opt) for _ in range(num_updates)]
                sums += len(rows) * torch.tensor([found[0], accepted], dtype=torch.float64)
            log_joint, acceptance = (sums / len(x)).tolist()
            history.append({"epoch": epoch, "log_joint": log_joint, "acceptance": acceptance,
                            "step_size": math.exp(log_step)})  # fmt: skip
    return history


def _update(joint: _Joint, rows: Tensor, z: Draws, optimizer: Optimizer) -> float:
    """One step of the parameters; the mean of log p(x, z) before it."""
    optimizer.zero_grad()
    loss = -joint.log_p(rows, z).mean()
    if not math.isfinite(loss.item()):
        raise NonFiniteError(f"log p(x, z) became {-loss.item()} at an update: lower the rate")
    loss.backward()
    optimizer.step()
    return -loss.item()


class _Joint:
    """log p(x, z) of some rows, and Hamiltonian moves of their z."""

    def __init__(self, model: Program, x: Tensor, args: Sequence[Any]) -> None:
        self.model, self.x, self.args = model, x, args

    def from_prior(self) -> Draws:
        """A draw of every row's latent variables.

        Raises:
            SiteError: see `mcem`.
        """
        rows = range(len(self.x))
        with torch.no_grad(), explained("model", (self.x, *self.args), 1):
            sites = self._sites(torch.as_tensor(rows, device=self.x.device), {})
        latent = {name: site for name, site in sites.items() if not site["is_observed"]}
        for name in sites.keys() - latent.keys():
            check_support(name, sites[name], -1, rows)
        for name, site in latent.items():
            if programs.log_prob(site).shape != (len(self.x),):
                raise SiteError(f'latent site "{name}" is not one for each row, in one plate')
            if not is_real(site["fn"]):
                raise SiteError(f'latent site "{name}" is not real, so no gradient moves it')
        return {name: site["value"].clone() for name, site in latent.items()}

    def log_p(self, rows: Tensor, z: Draws) -> Tensor:
        """`(rows,)`."""
        logs = [programs.log_prob(site) for site in self._sites(rows, z).values()]
        return torch.stack(torch.broadcast_tensors(*logs)).sum(0)

    def transition(
        self, rows: Tensor, z: Draws, step: float, num_leapfrog: int
    ) -> tuple[Draws, float]:
        """A Hamiltonian transition of every row, and their mean acceptance."""
        axes = {name: -value.dim() for name, value in z.items()}
        z, accepted = hamiltonian.move(
            lambda moved: self.log_p(rows, moved), axes, z, step, num_leapfrog
        )
        return z, accepted.mean().item()

    def _sites(self, rows: Tensor, z: Draws) -> dict[str, Site]:
        size = len(self.x)
        args = [
            a[rows] if isinstance(a, Tensor) and a.dim() and len(a) == size else a
            for a in (self.x, *self.args)
        ]
        return Pair(self.model, self.model, args).sites_at(self.model, z)
