"""Distributions that look at values as they are made or drawn from: to check, warn or choose."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_helpers import agree, assert_same, loss_and_grads, parameters, program, programs
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LatentStableReparam, StableReparam, SymmetricStableReparam
from torch import Tensor

import pyro_vae as pv
from pyro_vae.errors import CompileError

X = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)


def sine_skewed(x: Tensor) -> Tensor:
    base = dist.VonMises(torch.zeros(1), 1.0).to_event(1)
    return dist.SineSkewed(base, x[:1].tanh() / 2).log_prob(x[:, None])


def wishart(x: Tensor) -> Tensor:
    size = 1 + x[0] ** 2
    return dist.Wishart(4 + x[1] ** 2, scale_tril=torch.eye(2)).log_prob(torch.eye(2) * size)


@pytest.mark.parametrize("body", [sine_skewed, wishart])
def test_checks_and_warnings_are_made_once(body: Any) -> None:
    loss = program(body)
    run = pv.compile(loss, X, backend="eager")
    for x in (X, -X, X.flip(0)):
        agree(loss, run, x)
    assert programs(run) == 1


@pytest.mark.parametrize(
    ("reparam", "skew"),
    [(StableReparam, 0.4), (LatentStableReparam, 0.4), (SymmetricStableReparam, 0.0)],
)
@pytest.mark.parametrize("shape", [(), (2,)], ids=["one", "two"])
def test_stable_distributions_whatever_their_stability(
    reparam: Any, skew: float, shape: tuple[int, ...]
) -> None:
    """Near one Pyro takes another way; so may a later call of a program made far from it."""
    stability = torch.tensor(1.4, dtype=torch.float64)

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Stable(stability, skew, scale).expand(shape).to_event(len(shape)))
        pyro.sample("x", dist.Normal(z.sum(), 1.0).expand(x.shape).to_event(1), obs=x)

    hidden = pyro.poutine.reparam(model, config={"z": reparam()})
    guide = AutoNormal(hidden)
    guide(X)
    loss = pv.ELBO("monte_carlo")(hidden, guide)
    run = pv.compile(loss, X, backend="eager")
    params = parameters(guide)
    for now in (1.4, 1.004, 1.0, 0.6):
        stability.fill_(now)
        wanted = loss_and_grads(loss, (X,), params, 3)
        assert_same(loss_and_grads(run, (X,), params, 3), wanted, 1e-9)
    assert programs(run) == 1


def test_a_covariance_that_is_none_raises_as_it_does_eagerly() -> None:
    def model(covariance: Tensor) -> None:
        observed = dist.MultivariateNormal(covariance.new_zeros(2), covariance)
        pyro.sample("x", observed, obs=covariance.new_ones(2))

    compiled = pv.compile(pv.ELBO()(model, lambda _: None), torch.eye(2))
    assert compiled(2 * torch.eye(2)).isfinite()
    with pytest.raises(torch.linalg.LinAlgError, match=r"minor of order 2 is not positive"):
        compiled(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


def test_an_error_names_the_line_and_what_it_led_to() -> None:
    def body(x: Tensor) -> Tensor:
        return dist.SineBivariateVonMises(x[0], x[1], 1.0, 1 + x[2] ** 2, 0.1).log_prob(x[:2])

    where = r'"return dist\.Sine.*in body; pyro/distributions/sine_biv.*\.py, line \d+\)'
    with pytest.raises(CompileError, match=where):
        pv.compile(program(body), X, backend="eager")
