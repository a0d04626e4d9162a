"""The variants against closed forms: log p(x) of linear-Gaussian models, and what is refused."""

import numpy as np
import pyro
import pytest
import torch
from linear_classes import (
    BIAS,
    BOUND,
    CLASSES,
    MEANS,
    OFFSETS,
    WEIGHT,
    S,
    X,
    Y,
    class_means,
    decoder,
    exact_classifier,
    exact_posterior,
    gmvae,
    linear,
    log_px_given_y,
    m2,
)
from pyro.infer import SVI, TraceEnum_ELBO
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from toys import repeat, z_score_between

import pyro_vae as pv
from pyro_vae import ELBO
from pyro_vae.errors import AnalyticKLError, ConfigError, DataError, ShapeError, SupportError
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.networks import MLP
from pyro_vae.posteriors import Classifier, DiagonalNormal
from pyro_vae.priors import StandardNormal
from pyro_vae.variants import (
    GaussianMixtureVAE,
    HierarchicalVAE,
    SemiSupervisedVAE,
    StackedVAE,
    Unconditional,
    encoded,
)

# --- the conditional VAE, and the class means --------------------------------------------------


def cvae() -> pv.VAE:
    return pv.VAE(class_means(), decoder(), exact_posterior())


def test_conditional_log_px_is_the_closed_form():
    vae = cvae()
    for y in range(CLASSES):
        context = torch.eye(CLASSES)[[y] * len(X)]
        split = pv.Split(X, context=context)
        found = pv.log_marginal(vae.model, vae.guide, split, num_samples=50, defensive=0)
        # the posterior is exact, so every weight is p(x|y)
        np.testing.assert_allclose(found.log_px, log_px_given_y()[:, y], rtol=1e-6)
        np.testing.assert_allclose(found.log_px, pv.log_marginal(
            vae.model, vae.guide, X, context, num_samples=50, defensive=0
        ).log_px)  # fmt: skip


def test_class_means_refuse_what_is_no_class():
    prior = class_means()
    with pytest.raises(ConfigError, match="needs each datum's class"):
        prior()
    with pytest.raises(ShapeError, match=r"3 classes.*\(4, 2\)"):
        prior(torch.zeros(4, 2))
    with pytest.raises(ConfigError, match="context"):
        pv.fit(cvae(), X, epochs=1, batch_size=2, progress=False)


# --- M2 and the mixture ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [m2, gmvae])
def test_with_the_posterior_as_guide_every_draw_is_log_px(make):
    """log p(x, y) of the rows whose class is known, log p(x) = log sum_y p(y) p(x|y) of others."""
    vae = make().eval()
    joint = log_px_given_y(OFFSETS if make is m2 else torch.zeros_like(OFFSETS)) - np.log(CLASSES)
    marginal = logsumexp(joint, axis=1)
    mixed = np.where(Y >= 0, joint[np.arange(len(X)), Y.numpy()], marginal)
    objective = ELBO(kl="monte_carlo")
    assert -objective.loss(vae.model, vae.guide, X) == pytest.approx(marginal.sum(), rel=1e-5)
    assert -objective.loss(vae.model, vae.guide, X, Y) == pytest.approx(mixed.sum(), rel=1e-5)
    for split, expected in ((pv.Split(X), marginal), (pv.Split(X, context=Y), mixed)):
        found = pv.log_marginal(vae.model, vae.guide, split, num_samples=20)
        np.testing.assert_allclose(found.log_px, expected, rtol=1e-5)


def test_a_known_class_restricts_the_joint():
    """log p(x, y) = log p(y) + log p(x|y), p(x|y) that of the conditional VAE of the same parts."""
    joint, conditional = m2().eval(), cvae()
    labels = torch.tensor([0, 1, 2, 1])
    split = pv.Split(X, context=torch.eye(CLASSES)[labels])
    given = pv.log_marginal(
        conditional.model, conditional.guide, split, num_samples=20, defensive=0
    )
    both = pv.log_marginal(joint.model, joint.guide, X, labels, num_samples=20)
    np.testing.assert_allclose(both.log_px, given.log_px - np.log(CLASSES), rtol=1e-5)


@pytest.mark.parametrize("row", [1, 150])
@pytest.mark.parametrize("make", [m2, gmvae])
def test_log_px_names_the_nan_that_a_classifier_chokes_on(make, row):
    """Whether the row is among the first, which are tried before the others, or a later one."""
    vae = make().eval()
    x = X.repeat(50, 1)
    x[row, 1] = torch.nan
    with pytest.raises(DataError, match=rf"x\[{row}, 1\] = nan \(row {row}, column 1\)"):
        pv.log_marginal(vae.model, vae.guide, x, num_samples=20)


def test_labels_are_observed_in_training_alone():
    """Kingma et al. 2014, eq. 9: alpha times minus log q(y|x) of the rows with labels."""
    vae = m2(label_weight=7.0)
    objective = ELBO(kl="monte_carlo")
    q = vae.classifier(X).logits.log_softmax(-1).detach()
    loss = objective.loss(vae.train().model, vae.guide, X, Y)
    plain = objective.loss(vae.eval().model, vae.guide, X, Y)
    known = torch.stack([q[0, 2], q[2, 0]])
    assert loss - plain == pytest.approx(-7 * known.sum().item(), rel=1e-5)


def test_m2_trains_under_pyros_own_objective():
    vae = SemiSupervisedVAE(
        StandardNormal(1), decoder(), exact_posterior(), exact_classifier(), CLASSES, 1.5
    )
    theirs = TraceEnum_ELBO(max_plate_nesting=1)
    ours = ELBO(kl="monte_carlo")
    a = repeat(lambda: ours.loss(vae.model, vae.guide, X, Y), 150)
    b = repeat(lambda: theirs.loss(vae.model, vae.guide, X, Y), 150, seed=1)
    assert abs(z_score_between(a, b)) < BOUND
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), theirs)
    before = svi.evaluate_loss(X, Y)
    for _ in range(30):
        svi.step(X, Y)
    assert svi.evaluate_loss(X, Y) < before


def test_classes_are_told_and_encoded():
    vae = m2()
    joint = log_px_given_y()
    expected = joint - logsumexp(joint, axis=1, keepdims=True)
    np.testing.assert_allclose(vae.classify(X).logits.log_softmax(-1).detach(), expected, atol=1e-8)
    known = vae.classify(X, Y).probs
    assert torch.equal(known[0], torch.eye(CLASSES)[2])
    y = torch.where(Y >= 0, Y, vae.classify(X).probs.argmax(-1))
    torch.testing.assert_close(vae.encode(X, Y).mean, vae.guide.posterior(X, one(y)).mean)


def test_responsibilities_are_the_best_probabilities():
    """The bound is stationary in q(y|x) there, and sum_y q(y) (log q(y) / p(y) + KL_y) is its
    minimum, -log sum_y p(y) exp(-KL_y), with every KL worked out in numpy."""
    torch.manual_seed(3)
    vae = GaussianMixtureVAE(Normal(MLP(1, [], 2), S), DiagonalNormal(MLP(2, [4], 2)), CLASSES, 1)
    q, p = vae.encode(X), vae.prior(torch.arange(CLASSES))
    (m, s), (a, b) = (
        (d.mean.detach().numpy()[:, 0], d.stddev.detach().numpy()[:, 0]) for d in (q, p)
    )
    kl = np.log(b / s[:, None]) + (s[:, None] ** 2 + (m[:, None] - a) ** 2) / (2 * b**2) - 0.5
    normaliser = logsumexp(-kl, axis=1, keepdims=True)
    found = vae.classify(X).logits.log_softmax(-1).detach()
    np.testing.assert_allclose(found, -kl - normaliser, rtol=1e-9)
    terms = ELBO().terms(vae.model, vae.guide, X)
    best = np.log(CLASSES) - normaliser.sum(1)
    assert terms.kl.item() == pytest.approx(best.sum(), rel=1e-9)


def test_components_are_placed_where_the_data_are():
    """Three far groups: each gets a component of its own, and the clusters are the groups."""
    torch.manual_seed(0)
    groups = torch.arange(90) % 3
    x = 4 * torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.1, 1.0]])[groups] + 0.2 * torch.randn(90, 2)
    posterior = DiagonalNormal(linear(
        torch.cat([torch.eye(2), torch.zeros(2, 2)]), torch.tensor([0.0, 0.0, -4.0, -4.0])
    ))  # fmt: skip
    vae = GaussianMixtureVAE(Normal(MLP(2, [8], 2)), posterior, 3, 2)
    vae.place(x)
    clusters = vae.classify(x).probs.argmax(-1)
    assert pv.clustering_accuracy(clusters, groups) == 1
    for y in range(3):
        group = x[clusters == y]
        p = vae.prior(torch.tensor([y]))
        variance = group.var(0, correction=0) + np.exp(-4)
        np.testing.assert_allclose(p.mean[0].detach(), group.mean(0), atol=1e-3)
        np.testing.assert_allclose(p.variance[0].detach(), variance, rtol=1e-2)
    plain = vae.plain()
    assert plain.likelihood is vae.likelihood.part
    assert plain.posterior is posterior


def test_what_has_no_best_probabilities_says_so():
    flow = pv.posteriors.InverseAutoregressiveFlow(MLP(2, [], 6), 2, 2)
    vae = GaussianMixtureVAE(Normal(MLP(2, [], 2)), flow, 3, 2)
    with pytest.raises(AnalyticKLError, match="give a classifier"):
        ELBO(kl="auto").loss(vae.model, vae.guide, X)
    with pytest.raises(ConfigError, match="no plain VAE"):
        gmvae().plain()


def one(labels: Tensor) -> Tensor:
    return torch.eye(CLASSES)[labels]


@pytest.mark.parametrize("make", [m2, gmvae])
def test_generated_data_have_the_model_s_moments(make):
    vae, n = make(), 4000
    offsets = OFFSETS if make is m2 else torch.zeros_like(OFFSETS)
    locs = MEANS @ WEIGHT.T + offsets + BIAS
    for context, expected in ((None, locs.mean(0)), (torch.full((n,), 1), locs[1])):
        mean = vae.generate(n, context, seed=3).mean
        error = mean.std(0) / n**0.5
        assert ((mean.mean(0) - expected).abs() < BOUND * error).all()
    with pytest.raises(ShapeError, match="3 samples need a context"):
        vae.generate(3, torch.zeros(2, dtype=torch.long))
    z = torch.linspace(-3, 3, 7)[:, None]
    density = stats.norm(MEANS[:, 0].numpy(), 1.0).logpdf(z.numpy())
    expected = logsumexp(density, axis=1) - np.log(CLASSES)
    np.testing.assert_allclose(vae.prior().log_prob(z).detach(), expected, rtol=1e-4)


def test_a_prior_that_takes_no_notice_of_the_class_is_p_z():
    vae = SemiSupervisedVAE(
        StandardNormal(1), decoder(), exact_posterior(), exact_classifier(), CLASSES
    )
    z = torch.linspace(-3, 3, 7)[:, None]
    np.testing.assert_allclose(vae.prior().log_prob(z), stats.norm.logpdf(z.numpy())[:, 0])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 1, 3, 0]), r"y\[2\] = 3"),
        (torch.tensor([-1, -1, -2, 0]), r"y\[2\] = -2"),
        (torch.tensor([True, False, True, True]), "whole numbers"),
        (torch.eye(3)[[0, 1, 2, 0]], "whole numbers, -1 where"),
        (torch.zeros(4), "whole numbers"),
        (torch.zeros(4, 1, dtype=torch.long), r"shape \(4, 1\)"),
    ],
)
def test_labels_that_are_none(labels, words):
    """By every way in: `fit` with a split or a loader, `log_marginal`, and plain Pyro."""
    for vae, x in ((m2(), X), (stacked(), X)):
        options = {"epochs": 1, "batch_size": 4, "progress": False, "objective": ELBO(kl="auto")}
        with pytest.raises(DataError, match=words):
            pv.fit(vae, pv.Split(x, context=labels), **options)
        loader = DataLoader(TensorDataset(x, labels), batch_size=4)
        with pytest.raises(DataError, match=words):
            pv.fit(vae, loader, **options)
        with pytest.raises(DataError, match=words):
            pv.log_marginal(vae.model, vae.guide, x, labels, num_samples=5)
        with pytest.raises(DataError, match=words):
            TraceEnum_ELBO(max_plate_nesting=1).loss(vae.model, vae.guide, x, labels)


def test_an_unknown_class_is_not_the_last_one():
    """-1 would index it."""
    vae, z, unknown = m2(), torch.zeros(2, 1), torch.tensor([0, -1])
    asked = (
        lambda: vae.decode(z, unknown),
        lambda: vae.prior(unknown),
        lambda: vae.generate(2, unknown),
        lambda: stacked().generate(2, unknown),
    )
    for ask in asked:
        with pytest.raises(DataError, match=r"y\[1\] = -1"):
            ask()


def test_a_part_without_its_context_keeps_its_manners():
    """It refuses the same data, and starts at the same mean; a bare callable takes all."""
    vae = GaussianMixtureVAE(Bernoulli(MLP(1, [], 2)), DiagonalNormal(MLP(2, [], 2)), 3, 1)
    with pytest.raises(SupportError, match=r"x\[0, 0\] = 0\.3"):
        pv.fit(vae, X.abs(), epochs=1, batch_size=2, progress=False)
    vae.likelihood.initialize(torch.tensor([0.25, 0.5]))
    started = vae.decode(torch.zeros(1)).mean.detach()
    torch.testing.assert_close(started, torch.tensor([0.25, 0.5]))
    bare = Unconditional(lambda z: pyro.distributions.Normal(z, 1.0).to_event(1))
    bare.check(X)
    bare.initialize(X.mean(0))
    with pytest.raises(DataError, match="finite"):
        bare.check(X / 0)
    assert bare(X, Y).mean is X


@pytest.mark.parametrize("number", [2, 4])
def test_a_classifier_of_another_number_of_classes(number):
    """Of fewer it would be silently wrong: the others would never be guessed."""
    vae = SemiSupervisedVAE(
        class_means(), decoder(), exact_posterior(), Classifier(MLP(2, [], number)), CLASSES
    )
    with pytest.raises(ShapeError, match=f"over {number} classes, the model has 3"):
        ELBO(kl="monte_carlo").loss(vae.model, vae.guide, X)


def test_data_that_no_components_can_be_placed_by():
    vae = GaussianMixtureVAE(Normal(MLP(2, [], 2)), DiagonalNormal(MLP(2, [], 4)), 5, 2)
    with pytest.raises(DataError, match="5 components cannot be placed by 4 data"):
        vae.place(X)
    with pytest.raises(DataError, match=r"x\[1, 0\] = nan"):
        vae.place(torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]).repeat(3, 1))


def test_sizes_and_weights_that_mean_nothing():
    with pytest.raises(ConfigError, match="label_weight"):
        m2(label_weight=-1.0)
    with pytest.raises(ConfigError, match="2 posteriors, got 1"):
        HierarchicalVAE(StandardNormal(1), [exact_posterior()], decoder(), [exact_posterior()])


# --- M1+M2 -------------------------------------------------------------------------------------

A = torch.tensor([[1.0, 0.3], [-0.2, 0.7]], dtype=torch.float64)  # x ~ N(A z1, 0.5^2)


def stacked() -> StackedVAE:
    inverse = torch.linalg.inv(A)
    features = linear(torch.cat([inverse, torch.zeros(2, 2)]), torch.tensor([0.0, 0, -1.2, -1.0]))
    m1 = pv.VAE(StandardNormal(2), Normal(linear(A, torch.zeros(2)), 0.5), DiagonalNormal(features))
    return StackedVAE(m1, m2())


def test_stacked_log_px_is_the_closed_form():
    vae = stacked().eval()
    inner = (WEIGHT @ WEIGHT.T + S**2 * torch.eye(2)).numpy()
    covariance = A.numpy() @ inner @ A.numpy().T + 0.25 * np.eye(2)
    locs = (MEANS @ WEIGHT.T + OFFSETS + BIAS).numpy() @ A.numpy().T
    joint = np.stack(
        [stats.multivariate_normal(loc, covariance).logpdf(X.numpy()) for loc in locs], -1
    ) - np.log(CLASSES)
    mixed = np.where(Y >= 0, joint[np.arange(4), Y.numpy()], logsumexp(joint, axis=1))
    for split, expected in (
        (pv.Split(X), logsumexp(joint, axis=1)),
        (pv.Split(X, context=Y), mixed),
    ):
        found = pv.log_marginal(vae.model, vae.guide, split, num_samples=4000)
        assert (np.abs(found.log_px - expected) < BOUND * found.se).all()
    terms = ELBO(kl="auto").terms(vae.model, vae.guide, X, Y)
    assert terms.estimators == {"y": "enumerated", "z": "analytic", "z1": "monte_carlo"}


def test_encoded_data_are_draws_of_the_posterior():
    m1 = cvae_without_context()
    data = pv.Data(pv.Split(X, Y, context=Y), None, pv.Split(X[:1], Y[:1]))
    seen = encoded(m1, data)
    assert torch.equal(seen.train.context, Y)
    assert torch.equal(seen.train.y, Y)
    draws = torch.stack([seen.train.draw(seen.train.x, None) for _ in range(2000)])
    q = m1.encode(X)
    error = q.stddev / 2000**0.5
    assert ((draws.mean(0) - q.mean).abs() < BOUND * error).all()
    np.testing.assert_allclose(draws.std(0), q.stddev.detach(), rtol=0.1)
    flow = pv.posteriors.InverseAutoregressiveFlow(MLP(2, [], 6), 2, 2)
    vae = pv.VAE(StandardNormal(2), Normal(MLP(2, [], 2)), flow)
    with pytest.raises(ConfigError, match="DiagonalNormal"):
        encoded(vae, data)


def cvae_without_context() -> pv.VAE:
    return pv.VAE(StandardNormal(2), Normal(MLP(2, [4], 2)), DiagonalNormal(MLP(2, [4], 4)))


# --- layers ------------------------------------------------------------------------------------


def hierarchical(depth: int) -> HierarchicalVAE:
    """Every layer halves the one above: z_l ~ N(z_{l+1} / 2, 0.8^2), x ~ N(W z_1 + b, s^2)."""
    layer = torch.tensor([[0.5], [0.0]]), torch.tensor([0.0, 2 * np.log(0.8)])
    up = torch.tensor([[0.4], [0.0]]), torch.tensor([0.0, -0.3])
    first = torch.cat([0.5 * WEIGHT.T, torch.zeros(1, 2)]), torch.tensor([0.0, -0.5])
    return HierarchicalVAE(
        StandardNormal(1),
        [DiagonalNormal(linear(*layer)) for _ in range(depth - 1)],
        Normal(linear(WEIGHT, BIAS), S),
        [DiagonalNormal(linear(*first)), *(DiagonalNormal(linear(*up)) for _ in range(depth - 1))],
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_hierarchical_log_px_is_the_closed_form(depth):
    vae = hierarchical(depth)
    variance = 1.0
    for _ in range(depth - 1):
        variance = variance / 4 + 0.8**2
    covariance = variance * (WEIGHT @ WEIGHT.T).numpy() + S**2 * np.eye(2)
    expected = stats.multivariate_normal(BIAS.numpy(), covariance).logpdf(X.numpy())
    found = pv.log_marginal(vae.model, vae.guide, X, num_samples=4000)
    assert (np.abs(found.log_px - expected) < BOUND * found.se).all()
    estimators = ELBO(kl="auto").terms(vae.model, vae.guide, X).estimators
    names = [f"z{level}" for level in range(1, depth + 1)]
    assert estimators == dict.fromkeys(names, "monte_carlo") | {names[-1]: "analytic"}
    n = 4000
    mean = vae.generate(n, seed=2).mean
    assert ((mean.mean(0) - BIAS).abs() < BOUND * mean.std(0) / n**0.5).all()
    np.testing.assert_allclose(mean.var(0), variance * WEIGHT[:, 0] ** 2, rtol=0.15)


def test_one_layer_is_a_vae():
    vae = hierarchical(1)
    plain = pv.VAE(StandardNormal(1), vae.likelihood, vae.guide.posteriors[0])
    losses = []
    for each in (vae, plain):
        pyro.set_rng_seed(5)
        losses.append(ELBO().loss(each.model, each.guide, X))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# --- each goes through fit, and its weights through a file -------------------------------------


def bits(n: int, seed: int = 0) -> Tensor:
    return (torch.rand(n, 8, generator=torch.Generator().manual_seed(seed)) < 0.4).double()


def small(name: str) -> pv.vae.Generative:
    def q(inputs: int, outputs: int) -> DiagonalNormal:
        return DiagonalNormal(MLP(inputs, [6], 2 * outputs))

    def semi(features: int) -> SemiSupervisedVAE:
        p = Bernoulli(MLP(2 + CLASSES, [6], 8))
        if features != 8:
            p = Normal(MLP(2 + CLASSES, [6], features))
        classifier = Classifier(MLP(features, [6], CLASSES))
        return SemiSupervisedVAE(
            StandardNormal(2), p, q(features + CLASSES, 2), classifier, CLASSES, 2.0
        )

    p = Bernoulli(MLP(2, [6], 8))
    if name == "m2":
        return semi(8)
    if name == "stacked":
        return StackedVAE(pv.VAE(StandardNormal(3), Bernoulli(MLP(3, [6], 8)), q(8, 3)), semi(3))
    if name == "gmvae":
        classifier = Classifier(MLP(8, [6], CLASSES))
        return GaussianMixtureVAE(p, q(8 + CLASSES, 2), CLASSES, 2, classifier)
    if name == "gmvae without classifier":
        return GaussianMixtureVAE(p, q(8, 2), CLASSES, 2)
    return HierarchicalVAE(StandardNormal(3), [q(3, 2)], p, [q(8, 2), q(2, 3)])


@pytest.mark.parametrize(
    "name", ["m2", "stacked", "gmvae", "gmvae without classifier", "hierarchical"]
)
def test_each_trains_and_is_saved(name, tmp_path):
    torch.manual_seed(1)
    vae = small(name)
    before = {n: p.detach().clone() for n, p in vae.named_parameters()}
    labels = torch.arange(40) % (CLASSES + 1) - 1
    context = None if name == "hierarchical" else labels
    data = pv.Data(
        pv.Split(bits(40), context=context), pv.Split(bits(20, 1)), pv.Split(bits(20, 2))
    )
    run = pv.fit(vae, data, epochs=3, batch_size=10, out=tmp_path / "run", progress=False)
    assert all(np.isfinite(list(row.values())).all() for row in run.metrics)
    assert [n for n, p in vae.named_parameters() if torch.equal(p, before[n])] == []
    torch.manual_seed(2)
    again = small(name)
    pv.load_weights(again, tmp_path / "run" / "model.safetensors")
    found = [
        pv.log_marginal(v.model, v.guide, data.test, num_samples=10).log_px for v in (vae, again)
    ]
    np.testing.assert_array_equal(*found)
    assert vae.generate(5, seed=0).sample().shape == (5, 8)


def test_the_toy_is_trained_saved_loaded_and_reconstructed(tmp_path):
    """Ten groups of points in the plane, each of standard deviation 0.1, on the unit circle."""
    generator = torch.Generator().manual_seed(0)
    angles = 2 * torch.pi * (torch.arange(400) % 10) / 10
    centres = torch.stack([angles.cos(), angles.sin()], -1)
    x = centres + 0.1 * torch.randn(400, 2, generator=generator)

    def make() -> pv.VAE:
        torch.manual_seed(0)
        return pv.VAE(
            StandardNormal(2), Normal(MLP(2, [32], 2), 0.1), DiagonalNormal(MLP(2, [32], 4))
        )

    vae = make()
    pv.fit(vae, x, epochs=30, batch_size=50, learning_rate=1e-2, progress=False)
    pv.save_weights(vae, tmp_path / "toy.safetensors")
    loaded = make()
    pv.load_weights(loaded, tmp_path / "toy.safetensors")
    with torch.no_grad():
        reconstructed = loaded.decode(loaded.encode(x).mean).mean
        assert torch.equal(reconstructed, vae.decode(vae.encode(x).mean).mean)
    assert (reconstructed - x).square().mean() < 0.1 * x.square().mean()
