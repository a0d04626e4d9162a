"""Active units against guides whose posterior means are known."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import ConfigError, DataError, ShapeError, SiteError


def linear_guide(weight, scale=1.0):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, scale).to_event(1))

    return guide


def test_variance_of_a_linear_guide_is_that_of_its_means():
    x = torch.randn(500, 3)
    weight = torch.tensor([[1.0, 0.0, 0.02], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    units = pv.active_units(linear_guide(weight), x, batch_size=130)
    torch.testing.assert_close(units.variance["z"], (x @ weight).var(0))
    assert units.active["z"].tolist() == [True, False, False]
    assert units.number == 1
    assert pv.active_units(linear_guide(weight), x, threshold=1e-5).number == 2
    assert (
        pv.active_units(linear_guide(weight), x, threshold=0.0).number == 2
    )  # not of what is dead


@pytest.mark.parametrize(
    "objective", [pv.ELBO(), pv.ELBO(num_particles=3), pv.IWAE(4), pv.IWAE(4, "dreg")]
)
def test_objectives_count_the_units_of_their_call(objective):
    x = torch.randn(500, 3)
    weight = torch.tensor([[1.0, 0.0, 0.02], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    terms = objective.terms(model, linear_guide(weight), x)
    torch.testing.assert_close(terms.means["z"], x @ weight)
    assert terms.active_units()["z"].tolist() == [True, False, False]
    assert terms.active_units(1e-5)["z"].tolist() == [True, False, True]
    with pytest.raises(ShapeError, match=r'"z" has one'):
        objective.terms(model, linear_guide(weight), x[:1]).active_units()


@pytest.mark.parametrize("num_particles", [1, 3])
def test_means_are_a_row_a_datum_and_carry_no_gradient(num_particles):
    x, weight = torch.randn(3, 2, 4), torch.randn(4, 5, requires_grad=True)

    def program(loc):
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    objective = pv.ELBO(num_particles=num_particles)
    pair = (lambda: program(torch.zeros(5))), (lambda: program(x @ weight))
    means = objective.terms(*pair).means["z"]
    torch.testing.assert_close(means, (x @ weight).detach().reshape(6, 5))
    assert not means.requires_grad


def test_a_guide_without_means_is_averaged_without_the_noise_of_its_draws():
    x = torch.randn(2000, 2)

    def guide(x):
        base = dist.Normal(torch.stack([x[:, 0], 0 * x[:, 0]], -1), 1.0).to_event(1)
        twice = dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [twice]))

    # x was drawn from seed 0: another one, or draws and data are the same numbers
    variance = pv.active_units(guide, x, num_samples=8, seed=1).variance["z"]
    # each half averages 4 draws, so has noise of variance 1; the mutant that squares one average
    # is too large by that. Standard errors: sqrt(2 * 4 + 1) and 1, over sqrt(2000)
    assert abs(variance[0].item() - 4 * x[:, 0].var().item()) < 4.5 * 3 / 2000**0.5
    assert abs(variance[1].item()) < 4.5 / 2000**0.5


def test_draws_of_all_rows_are_as_many_as_were_asked_for():
    sizes = []

    def guide(x):
        sizes.append(len(x))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("b", dist.LogNormal(pyro.sample("c", dist.Normal(x, 1.0).to_event(1)), 1.0)
                        .to_event(1))  # fmt: skip

    pv.active_units(guide, torch.randn(7, 1), num_samples=10, batch_size=5)
    assert sizes == [5] * 10 + [2] * 10


@pytest.mark.parametrize("form", ["plain", "event", "masked"])
def test_classes_are_no_units_in_whatever_form(form):
    x = torch.tensor([[0], [1], [1], [3]])

    def guide(x):
        classes = dist.Categorical(nn.functional.one_hot(x, 4).double())
        if form == "plain":
            classes = dist.Categorical(classes.probs[:, 0])
        elif form == "event":
            classes = classes.to_event(1)
        else:
            classes = classes.to_event(1).mask(x[:, 0] > 0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.double(), 1.0).to_event(1))
            pyro.sample("y", classes)

    assert set(pv.active_units(guide, x).variance) == {"z"}


def test_deeper_layers_are_averaged_over_the_upper_ones():
    x = torch.randn(1000, 1)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("b", dist.Normal(2 * a, 0.1).to_event(1))

    units = pv.active_units(guide, x, num_samples=64, seed=1)
    assert units.variance["b"].item() == pytest.approx(4 * x.var().item(), rel=0.1)
    assert set(units.variance) == {"a", "b"}


def test_the_guide_runs_in_evaluation_mode_and_is_left_as_it_was():
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Normal(nn.Linear(2, 3), 1.0),
        pv.posteriors.DiagonalNormal(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4))),
    )
    x = torch.randn(50, 3)
    state = torch.get_rng_state()
    units = pv.active_units(vae.guide, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.guide.training
    vae.eval()
    torch.testing.assert_close(units.variance["z"], vae.encode(x).mean.var(0).detach())


def test_contexts_reach_the_guide_and_classes_are_no_units():
    x, context = torch.randn(200, 2), torch.randn(200, 3)

    def guide(x, context):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x))
            pyro.sample("z", dist.Normal(x[:, :1] * context, 1.0).to_event(1))

    units = pv.active_units(guide, x, context=context, batch_size=70)
    assert set(units.variance) == {"z"}
    torch.testing.assert_close(units.variance["z"], (x[:, :1] * context).var(0))
    with pytest.raises(ShapeError, match="200 data need as many contexts, got 3"):
        pv.active_units(guide, x, context=context[:3])


def test_units_of_splits_and_arrays_in_the_precision_of_the_guide():
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Normal(nn.Linear(5, 3), 1.0),
        pv.posteriors.DiagonalNormal(pv.networks.MLP(6, [], 4)),
    ).float()
    x, context = torch.randn(40, 3), torch.randn(40, 3)
    expected = vae.encode(x.float(), context.float()).mean.var(0).detach()
    split = pv.Split(x, context=context)
    found = [
        pv.active_units(vae.guide, split),
        pv.active_units(vae.guide, pv.Split(x), context=context),
        pv.active_units(vae.guide, x.numpy(), context=context.numpy()),
    ]
    for units in found:
        assert units.variance["z"].dtype == torch.float32
        torch.testing.assert_close(units.variance["z"], expected)
    drawn = pv.Split(torch.full((40, 3), 0.5), draw=pv.data.bernoulli_draw, seed=3)
    weight = torch.eye(3)
    variance = pv.active_units(linear_guide(weight), drawn).variance["z"]
    torch.testing.assert_close(variance, drawn.fixed().x.var(0))
    with pytest.raises(ConfigError, match="context= has no place"):
        pv.active_units(vae.guide, split, context=context)
    with pytest.raises(ConfigError, match=r"the guide must be a Pyro program.*got 3"):
        pv.active_units(3, x)
    with pytest.raises(DataError, match="Data of several splits"):
        pv.active_units(vae.guide, pv.Data(split, None, split))


def test_terms_without_means_have_no_units_to_count():
    terms = pv.objectives.Terms(torch.zeros(()), torch.zeros(()), torch.zeros(()))
    with pytest.raises(SiteError, match="no mean of any latent site"):
        terms.active_units()


def test_what_has_no_covariance_is_refused():
    weight = torch.eye(2)
    with pytest.raises(ShapeError, match="at least two"):
        pv.active_units(linear_guide(weight), torch.zeros(1, 2))
    with pytest.raises(ConfigError):
        pv.active_units(linear_guide(weight), torch.zeros(3, 2), num_samples=1)
    with pytest.raises(ShapeError, match='site "z" has shape'):
        pv.active_units(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), torch.zeros(3, 2))


def test_clustering_accuracy_is_the_best_matching():
    clusters = torch.tensor([3, 3, 3, 0, 0, 1, 1, 1])
    labels = torch.tensor([0, 0, 1, 2, 2, 1, 1, 0])
    best = max(
        sum(match[c] == y for c, y in zip(clusters.tolist(), labels.tolist(), strict=True))
        for match in itertools.permutations(range(4))
    )
    assert pv.clustering_accuracy(clusters, labels) == best / 8 == 6 / 8
    with pytest.raises(ShapeError, match="clusters of shape"):
        pv.clustering_accuracy(clusters, labels[:3])


def test_clustering_accuracy_scores_no_unknown_class():
    clusters, labels = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 2])
    assert pv.clustering_accuracy(clusters.double(), labels.int()) == 1
    with pytest.raises(DataError, match=r"whole numbers from 0 on, but labels\[2\] = -1"):
        pv.clustering_accuracy(clusters, torch.tensor([0, 1, -1, 2]))
    for wrong in (0.5, -1.0, float("nan"), float("inf")):
        bad = clusters.double()
        bad[3] = wrong
        with pytest.raises(DataError, match=rf"but clusters\[3\] = {wrong:g}"):
            pv.clustering_accuracy(bad, labels)
