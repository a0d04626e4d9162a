"""What the variants train by, against the same bounds worked out by hand.

The class is summed in numpy, expectations over z are closed forms (linear decoders) or quadrature,
and no guide is the posterior: a term that is missing, doubled or of the wrong class shows.
"""

import itertools

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from linear_classes import BIAS, BOUND, CLASSES, FEATURES, OFFSETS, WEIGHT, S, X, Y, decoder, linear
from pyro import poutine
from scipy import stats
from scipy.special import log_softmax, logsumexp
from toys import gradient_of, repeat, z_scores

import pyro_vae as pv
from pyro_vae import ELBO
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.networks import MLP
from pyro_vae.posteriors import Classifier, DiagonalNormal
from pyro_vae.priors import ClassMeans, StandardNormal
from pyro_vae.variants import (
    GaussianMixtureVAE,
    HierarchicalVAE,
    SemiSupervisedVAE,
    StackedVAE,
    Unconditional,
)

ALPHA = 3.0
DRAWS = 150


def m2() -> SemiSupervisedVAE:
    """Its guide is nowhere near the posterior."""
    return SemiSupervisedVAE(
        ClassMeans(CLASSES, 1), decoder(), DiagonalNormal(MLP(FEATURES + CLASSES, [4], 2)),
        Classifier(MLP(FEATURES, [4], CLASSES)), CLASSES, ALPHA,
    )  # fmt: skip


def parts(vae: SemiSupervisedVAE) -> dict[str, torch.Tensor]:
    """Every quantity of the bound at every class, `(rows, classes)`; differentiable."""
    rows, ys = X.repeat_interleave(CLASSES, 0), torch.eye(CLASSES).repeat(len(X), 1)
    q, p = vae.guide.posterior(rows, ys), vae.model.prior(ys)
    m, v, a, b = (t.reshape(len(X), CLASSES) for t in (q.mean, q.variance, p.mean, p.variance))
    given = getattr(vae.model.likelihood, "part", None) is None
    offsets = OFFSETS if given else torch.zeros_like(OFFSETS)
    residual = X[:, None] - m[..., None] @ WEIGHT.T - offsets - BIAS
    square = residual.square().sum(-1) + WEIGHT.square().sum() * v
    return {
        "reconstruction": -FEATURES / 2 * np.log(2 * np.pi * S**2) - square / (2 * S**2),
        "kl_z": 0.5 * ((b / v).log() + (v + (m - a) ** 2) / b - 1),
        "log_q": vae.classifier(X).logits.log_softmax(-1),
    }


def minus_j(vae: SemiSupervisedVAE, labels: torch.Tensor | None) -> torch.Tensor:
    """Minus J^alpha of Kingma et al. 2014: eq. 6 of the rows with labels, eq. 7 of the others, and
    the classification loss of eq. 9."""
    at = parts(vae)
    minus_l = at["reconstruction"] - at["kl_z"] - np.log(CLASSES)  # -L(x, y)
    minus_u = (at["log_q"].exp() * (minus_l - at["log_q"])).sum(1)  # -U(x)
    total = torch.zeros(())
    for row in range(len(X)):
        y = -1 if labels is None else int(labels[row])
        total = total + (minus_u[row] if y < 0 else minus_l[row, y] + ALPHA * at["log_q"][row, y])
    return total


@pytest.mark.parametrize(("kl", "labels"), [("auto", None), ("auto", Y), ("monte_carlo", Y)])
def test_the_objective_of_m2_and_its_gradient(kl, labels):
    vae = m2()
    exact = minus_j(vae, labels)
    args = (X,) if labels is None else (X, labels)
    loss = ELBO(kl=kl)

    def draw():
        found = loss.differentiable_loss(vae.model, vae.guide, *args)
        return torch.cat([-found.reshape(1), -gradient_of(found, vae.model.prior, vae.guide)])

    slope = gradient_of(exact, vae.model.prior, vae.guide)
    truth = torch.cat([exact.detach().reshape(1), slope])
    assert z_scores(repeat(draw, DRAWS), truth).abs().max() < BOUND


def gmvae(with_classifier: bool) -> GaussianMixtureVAE:
    extra = CLASSES if with_classifier else 0
    classifier = Classifier(MLP(FEATURES, [4], CLASSES)) if with_classifier else None
    posterior = DiagonalNormal(MLP(FEATURES + extra, [4], 2))
    return GaussianMixtureVAE(Normal(linear(WEIGHT, BIAS), S), posterior, CLASSES, 1, classifier)


@pytest.mark.parametrize("with_classifier", [True, False])
@pytest.mark.parametrize("labels", [None, Y])
def test_the_bound_of_the_mixture_is_a_sum_over_clusters(with_classifier, labels):
    vae = gmvae(with_classifier)
    args = (X,) if labels is None else (X, labels)
    at = {name: value.detach().numpy() for name, value in parts(vae).items()}
    if not with_classifier:  # the best q(y|x), of every row by itself
        at["log_q"] = log_softmax(-at["kl_z"], axis=1)
    q = np.exp(at["log_q"])
    if labels is not None:
        known = labels.numpy() >= 0
        q[known] = np.eye(CLASSES)[labels.numpy()[known]]
    entropy = -np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0).sum(1)
    kl = (q * at["kl_z"]).sum(1) + np.log(CLASSES) - entropy
    objective = ELBO(kl="auto")
    terms = objective.terms(vae.model, vae.guide, *args)
    assert terms.kl.item() == pytest.approx(kl.sum(), rel=1e-9)
    assert terms.estimators == {"y": "enumerated", "z": "analytic"}
    draws = repeat(lambda: objective.terms(vae.model, vae.guide, *args).reconstruction, DRAWS)
    assert abs(z_scores(draws, (q * at["reconstruction"]).sum())) < BOUND


def test_the_stacked_model_observes_labels_at_the_features():
    """alpha log q(y|z1) at the z1 that was drawn, of the rows with labels, in training alone."""
    m1 = pv.VAE(StandardNormal(2), Normal(MLP(2, [3], 3), S), DiagonalNormal(MLP(3, [3], 4)))
    vae, x = StackedVAE(m1, m2()), torch.randn(4, 3)
    guide = poutine.trace(vae.guide).get_trace(x, Y)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x, Y)
    label = model.nodes["label"]
    log_q = vae.m2.classifier(guide.nodes["z1"]["value"]).logits.log_softmax(-1)
    expected = ALPHA * torch.stack([log_q[0, 2], torch.tensor(0.0), log_q[2, 0], torch.tensor(0.0)])
    model.compute_log_prob()
    torch.testing.assert_close(label["log_prob"], expected)
    vae.eval()
    assert "label" not in poutine.trace(vae.model).get_trace(x, Y).nodes
    torch.testing.assert_close(vae.encode(x).mean, m1.encode(x).mean)
    torch.testing.assert_close(
        vae.classify(x).logits, vae.m2.classifier(m1.encode(x).mean).logits.log_softmax(-1)
    )
    assert vae.classify(x, Y).probs[0].tolist() == [0, 0, 1]


BITS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)


def quadrature(number: int = 60) -> tuple[torch.Tensor, np.ndarray]:
    """Nodes and log-weights of E[f(z)], z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(number)
    return torch.as_tensor(nodes)[:, None], np.log(weights / weights.sum())


def layers() -> HierarchicalVAE:
    """z2 ~ N(0, 1), z1 ~ N(f(z2), g(z2)), three pixels: none of it is linear."""
    return HierarchicalVAE(
        StandardNormal(1),
        [DiagonalNormal(MLP(1, [3], 2))],
        Bernoulli(MLP(1, [3], 3)),
        [DiagonalNormal(MLP(3, [3], 2)), DiagonalNormal(MLP(1, [3], 2))],
    )


@torch.no_grad()
def test_two_layers_by_quadrature():
    """log p(x) as a double integral; the bound as one, over the guide, which lies below it."""
    torch.manual_seed(3)
    vae = layers()
    for parameter in vae.model.parameters():
        parameter.mul_(2.0)
    nodes, log_w = quadrature()
    p1 = vae.model.layers[0](nodes)  # a row a node of z2
    z1 = p1.mean + p1.stddev * nodes.T
    log_x = vae.likelihood(z1[..., None]).log_prob(BITS[:, None, None]).numpy()
    log_px = logsumexp(log_x + log_w[:, None] + log_w, axis=(1, 2))
    assert np.exp(log_px).sum() == pytest.approx(1, abs=1e-8)
    found = pv.log_marginal(vae.model, vae.guide, BITS, num_samples=5000)
    assert (np.abs(found.log_px - log_px) < BOUND * found.se).all()

    q1 = vae.guide.posteriors[0](BITS)
    z1 = q1.mean + q1.stddev * nodes.T  # (rows, nodes of z1)
    q2 = vae.guide.posteriors[1](z1[..., None])
    z2 = q2.mean + q2.stddev * nodes.T  # (rows, nodes of z1, nodes of z2)
    p1 = vae.model.layers[0](z2[..., None])

    def log_normal(z, d):
        mean, scale = (t.numpy() for t in (d.mean, d.stddev))
        return stats.norm(mean.reshape(z.shape), scale.reshape(z.shape)).logpdf(z.numpy())

    every = z1[..., None].expand_as(z2)
    log_ratio = (
        vae.likelihood(every[..., None]).log_prob(BITS[:, None, None]).numpy()
        + log_normal(every, p1) + stats.norm.logpdf(z2.numpy())
        - stats.norm(q1.mean[..., None].numpy(), q1.stddev[..., None].numpy()).logpdf(every.numpy())
        - stats.norm(q2.mean.numpy(), q2.stddev.numpy()).logpdf(z2.numpy())
    )  # fmt: skip
    bound = (log_ratio * np.exp(log_w[:, None] + log_w)).sum((1, 2))
    assert (bound < log_px).all()
    for kl in ("auto", "monte_carlo"):
        objective = ELBO(kl=kl)
        draws = repeat(lambda o=objective: -o.loss(vae.model, vae.guide, BITS), DRAWS)
        assert abs(z_scores(draws, bound.sum())) < BOUND


def test_a_layer_may_be_any_callable():
    def above(z):
        return dist.Normal(z / 2, 1.0).to_event(1)

    posteriors = [DiagonalNormal(MLP(3, [], 2)), Unconditional(DiagonalNormal(MLP(1, [], 2)))]
    vae = HierarchicalVAE(StandardNormal(1), [above], Bernoulli(MLP(1, [], 3)), posteriors)
    assert vae.generate(4000, seed=1).mean.shape == (4000, 3)
    assert np.isfinite(ELBO(kl="auto").loss(vae.model, vae.guide, BITS))
