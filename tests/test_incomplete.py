"""Holes in the data: they have no part in log p(x), in gradients or in training."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from evidence_pairs import Linear
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import likelihoods, networks, posteriors
from pyro_vae.errors import ConfigError, DataError, NonFiniteError, SiteError, SupportError

NAN = float("nan")


def with_holes(x, share=0.3, seed=5):
    """x with holes, a value left in every row."""
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    holes[:, 0] &= ~holes.all(1)
    return torch.where(holes, NAN, x)


def mixed_kinds():
    return [
        likelihoods.Normal(),
        likelihoods.Bernoulli(),
        likelihoods.Categorical(num_categories=4),
        likelihoods.Poisson(),
    ]


def mixed_table(rows=40):
    generator = torch.Generator().manual_seed(2)
    columns = [
        torch.randn(rows, generator=generator),
        torch.randint(0, 2, (rows,), generator=generator),
        torch.randint(0, 4, (rows,), generator=generator),
        torch.randint(0, 9, (rows,), generator=generator),
    ]
    return torch.stack([c.double() for c in columns], 1)


def mixed_vae(latent=2, mask=True, seed=0, **options):
    torch.manual_seed(seed)
    kinds = mixed_kinds()
    decoder = networks.MLP(latent, [8], likelihoods.Columns.outputs(kinds))
    encoder = networks.MLP(8 if mask else 4, [8], 2 * latent)
    return pv.VAE(
        pv.priors.StandardNormal(latent),
        likelihoods.Incomplete(likelihoods.Columns(decoder, kinds), **options),
        posteriors.Incomplete(posteriors.DiagonalNormal(encoder), mask=mask),
    )


def linear_vae(p: Linear) -> pv.VAE:
    """The linear model with a linear encoder of its own, that sees zeros in the holes."""
    features, latent = p.W.shape
    decoder = networks.MLP(latent, [], features)
    decoder.layers[0].weight.data.copy_(p.W)
    decoder.layers[0].bias.data.copy_(p.b)
    torch.manual_seed(1)
    encoder = networks.MLP(features, [], 2 * latent)
    for parameter in encoder.parameters():
        parameter.data.mul_(0.3)
    return pv.VAE(
        pv.priors.StandardNormal(latent),
        likelihoods.Incomplete(likelihoods.Normal(decoder, p.sigma)),
        posteriors.Incomplete(posteriors.DiagonalNormal(encoder)),
    )


def test_log_p_of_mixed_columns_is_that_of_the_observed_by_scipy():
    vae = mixed_vae()
    x = with_holes(mixed_table())
    z = torch.randn(len(x), 2)
    outputs = vae.likelihood.likelihood.network(z).detach().numpy()
    scale = vae.likelihood.likelihood.kinds[0].scale().item()
    full = torch.nan_to_num(x, nan=0.0).numpy()
    columns = [
        stats.norm(outputs[:, 0], scale).logpdf(full[:, 0]),
        stats.bernoulli(1 / (1 + np.exp(-outputs[:, 1]))).logpmf(full[:, 1]),
        np.log(np.exp(outputs[:, 2:6]) / np.exp(outputs[:, 2:6]).sum(1, keepdims=True))[
            np.arange(len(x)), full[:, 2].astype(int)
        ],
        stats.poisson(np.exp(outputs[:, 6])).logpmf(full[:, 3]),
    ]
    oracle = np.where(x.isnan(), 0.0, np.stack(columns, 1)).sum(1)
    np.testing.assert_allclose(vae.decode(z).log_prob(x).detach(), oracle, rtol=1e-10)


def test_log_marginal_of_a_linear_model_is_that_of_the_observed_values():
    p = Linear.random(4, 2)
    vae, x = linear_vae(p), with_holes(p.draw(30))
    found = pv.log_marginal(vae.model, vae.guide, x, num_samples=4000)
    covariance = (p.W @ p.W.T + p.sigma**2 * torch.eye(4)).numpy()
    for row, log_px, se in zip(x, found.log_px, found.se, strict=True):
        seen = (~row.isnan()).numpy()
        marginal = stats.multivariate_normal(p.b[seen], covariance[np.ix_(seen, seen)])
        # 30 z-scores beyond 4: odds of 1 in 500
        assert abs(log_px - marginal.logpdf(row[seen])) < 4 * se


@pytest.mark.parametrize("objective", [pv.ELBO(kl="analytic"), pv.IWAE(5), pv.IWAE(5, "dreg")])
def test_gradients_are_finite_and_holes_have_no_part_in_them(objective):
    vae = mixed_vae(mask=False)
    x = with_holes(mixed_table())
    vae.guide.posterior.fill.fill_(0.0)

    def gradient(data):
        vae.zero_grad()
        torch.manual_seed(3)
        objective.differentiable_loss(vae.model, vae.guide, data).backward()
        return torch.cat([p.grad.flatten() for p in vae.parameters()])

    first = gradient(x)
    assert first.isfinite().all()
    column = x.clone()
    column[:, 3] = NAN  # nothing seen of it: the network's part for it gets no gradient
    gradient(column)
    last = vae.likelihood.likelihood.network.layers[-1]
    assert (last.bias.grad[6] == 0).all()
    assert (last.bias.grad[:6] != 0).all()


def test_fit_trains_on_holes_from_nan_or_a_mask():
    p = Linear.random(4, 2)
    whole = p.draw(500)
    x = with_holes(whole, 0.4)
    runs = []
    for data in (x, torch.where(~x.isnan(), whole, torch.nan)):
        vae = linear_vae(p)
        vae.model.likelihood.likelihood.network.layers[0].weight.data.mul_(0.1)
        run = pv.fit(vae, data, objective=pv.IWAE(5), epochs=30, learning_rate=0.02, progress=False)
        assert run.metrics[-1]["train_elbo"] > run.metrics[0]["train_elbo"]
        assert all(parameter.isfinite().all() for parameter in vae.parameters())
        runs.append(run.metrics[-1]["train_loss"])
    assert runs[0] == runs[1]
    found = pv.log_marginal(vae.model, vae.guide, whole[:200], num_samples=200)
    exact = p.log_px(whole[:200]).mean().item()
    assert exact - 0.35 < found.mean < exact + 0.1  # trained on holes, judged on whole data


def test_fit_takes_numpys_masked_values_for_holes():
    x = with_holes(mixed_table())
    masked = np.ma.masked_array(x.nan_to_num(nan=-999.0).numpy(), x.isnan().numpy())
    runs = [pv.fit(mixed_vae(), data, epochs=2, batch_size=20, progress=False)
            for data in (x, masked)]  # fmt: skip
    assert runs[0].metrics[-1]["train_loss"] == runs[1].metrics[-1]["train_loss"]


def test_a_loader_yields_holes_and_a_compiled_step_takes_them():
    x = with_holes(mixed_table(64))
    loader = DataLoader(TensorDataset(x), batch_size=32)
    run = pv.fit(mixed_vae(), loader, epochs=2, progress=False)
    assert np.isfinite(run.metrics[-1]["train_loss"])
    vae = mixed_vae()
    loss = pv.ELBO()(vae.model, vae.guide)
    compiled = pv.compile(loss, backend="eager")
    losses = []
    for step in (loss, compiled):
        torch.manual_seed(0)
        losses.append(step(x).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_the_mask_reaches_the_posterior_beside_the_context():
    seen = {}

    def posterior(x, context):
        seen.update(x=x, context=context)
        return dist.Normal(x[..., :1], 1.0)

    x, context = torch.tensor([[1.0, NAN], [NAN, 4.0]]), torch.tensor([[7.0], [8.0]])
    posteriors.Incomplete(posterior, torch.tensor([-1.0, -2.0]), mask=True)(x, context)
    assert seen["x"].tolist() == [[1.0, -2.0], [-1.0, 4.0]]
    assert seen["context"].tolist() == [[1.0, 0.0, 7.0], [0.0, 1.0, 8.0]]


def test_parts_that_take_no_context_are_called_without():
    x = with_holes(mixed_table()[:, :2])
    context = torch.randn(len(x), 3)
    prior, decoder = pv.priors.StandardNormal(2), networks.MLP(5, [], 2)
    told = likelihoods.Normal(decoder, 1.0)

    def likelihood(z):
        return dist.Normal(2 * z, 1.0).to_event(1)

    def posterior(x):
        return dist.Normal(x, 1.0).to_event(1)

    vae = pv.VAE(prior, likelihoods.Incomplete(likelihood), posteriors.Incomplete(posterior))
    assert torch.equal(vae.encode(x, context).mean, x.nan_to_num())
    z = torch.randn(len(x), 2)
    oracle = np.nansum(stats.norm(2 * z.numpy(), 1).logpdf(x), 1)
    np.testing.assert_allclose(vae.decode(z, context).log_prob(x), oracle, rtol=1e-12)
    vae.likelihood.initialize(x.nanmean(0))  # a function has no bias to set

    vae = pv.VAE(prior, likelihoods.Incomplete(told), posteriors.Incomplete(posterior))
    mean = decoder(torch.cat([z, context], -1))
    torch.testing.assert_close(vae.decode(z, context).mean, mean)
    assert pv.fit(
        vae, pv.Split(x, context=context), epochs=1, batch_size=20, progress=False
    ).metrics


def test_a_mask_that_would_not_be_seen_is_refused():
    with pytest.raises(ConfigError, match="mask=True gives the posterior a context"):
        posteriors.Incomplete(lambda x: dist.Normal(x, 1.0).to_event(1), mask=True)


def test_parts_that_return_no_distribution_are_named():
    with pytest.raises(ConfigError, match="returned a builtins"):
        likelihoods.Incomplete(lambda z: 1)(torch.zeros(3, 2))
    with pytest.raises(ConfigError, match="returned a builtins"):
        posteriors.Incomplete(lambda x: 1)(torch.zeros(3, 2))


def test_output_bias_starts_at_the_mean_of_what_is_observed():
    x = mixed_table()
    x[:30, 0] = NAN
    data = pv.Data(pv.Split(x), None, pv.Split(x))
    vae = mixed_vae()
    vae.likelihood.initialize(data.train_mean())
    bias = vae.likelihood.likelihood.network.layers[-1].bias
    assert bias[0].item() == pytest.approx(x[30:, 0].mean().item())
    x[:, 0] = NAN
    with pytest.raises(DataError, match="column 0"):
        vae.likelihood.initialize(data.train_mean())


def test_what_holes_cannot_be():
    x = with_holes(mixed_table())
    vae = mixed_vae()
    vae.check(x)
    with pytest.raises(SupportError, match=r"row 0, column 2"):
        vae.check(torch.tensor([[NAN, 1.0, 7.0, NAN]]))
    with pytest.raises(DataError, match="inf"):
        vae.check(torch.tensor([[float("inf"), 1.0, NAN, NAN]]))
    empty = torch.cat([x, torch.full((2, 4), NAN)])
    with pytest.raises(DataError, match=r"row 40 \(and 1 more\) has no observed value"):
        vae.check(empty)
    mixed_vae(allow_empty=True).check(empty)
    plain = pv.VAE(vae.prior, vae.likelihood.likelihood, vae.posterior)
    with pytest.raises(DataError, match="nan"):
        pv.fit(plain, x, epochs=1, batch_size=20)


def test_an_encoder_that_knows_no_holes_stops_training_by_name():
    x = with_holes(mixed_table())
    vae = mixed_vae(mask=False)
    blind = pv.VAE(vae.prior, vae.likelihood, vae.posterior.posterior)
    x[:20] = mixed_table()[:20]  # the first rows, which fit tries, have no holes
    with pytest.raises(NonFiniteError, match="step"):
        pv.fit(blind, x, epochs=1, batch_size=20, progress=False)
    assert all(parameter.isfinite().all() for parameter in blind.parameters())


def test_dynamic_binarisation_would_make_numbers_of_holes():
    from pyro_vae.data import bernoulli_draw

    torch.manual_seed(0)
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        likelihoods.Incomplete(likelihoods.Bernoulli(networks.MLP(2, [], 3))),
        posteriors.Incomplete(posteriors.DiagonalNormal(networks.MLP(3, [], 4))),
    )
    split = pv.Split(torch.tensor([[0.5, NAN, 0.2]] * 4), draw=bernoulli_draw)
    with pytest.raises(DataError, match="nan"):
        pv.fit(vae, split, epochs=1, batch_size=2)


def test_dependent_values_cannot_be_left_out():
    def likelihood(z):
        return dist.MultivariateNormal(z, torch.eye(2))

    with pytest.raises(SiteError, match="MultivariateNormal are not independent"):
        likelihoods.Incomplete(likelihood)(torch.zeros(3, 2))


def test_draws_and_means_are_of_whole_data():
    vae = mixed_vae()
    p = vae.generate(5, seed=0)
    assert p.sample().isfinite().all()
    assert p.mean.isfinite().all()
    assert p.expand((3, 5)).sample().shape == (3, 5, 4)
