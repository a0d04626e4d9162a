"""The VAE as a Pyro model and guide: scripts, stores, copies, and what it refuses."""

import copy
import io
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from toys import repeat, z_score_between

import pyro_vae as pv
from pyro_vae.errors import ConfigError, DataError, ParameterStoreError, ShapeError, SupportError

FEATURES, LATENT = 6, 2
LIKELIHOODS = (pv.likelihoods.Bernoulli, pv.likelihoods.Normal)
BOUNDS = (Trace_ELBO, TraceMeanField_ELBO, pv.ELBO, lambda: pv.IWAE(3, "dreg"))


def make_vae(likelihood=pv.likelihoods.Bernoulli, name=None, seed=0) -> pv.VAE:
    pyro.set_rng_seed(seed)
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=likelihood(pv.networks.MLP(LATENT, [5], FEATURES)),
        posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(FEATURES, [5], 2 * LATENT)),
        name=name,
    )


def make_data(num_data=8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 2, (num_data, FEATURES), generator=generator).double()


def adam():
    return pyro.optim.Adam({"lr": 0.01})


def weights(vae) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in vae.named_parameters()}


def all_moved(vae, before) -> bool:
    return all(not torch.equal(value, before[name]) for name, value in vae.named_parameters())


def unmoved(vae, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in vae.named_parameters())


# --- scripts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_svi_and_torch_optimizer_take_the_same_steps(bound, local):
    x = make_data()
    with pyro.settings.context(module_local_params=local):
        by_svi, by_torch = make_vae(), make_vae()
        before = weights(by_svi)
        svi = SVI(by_svi.model, by_svi.guide, adam(), bound())
        pyro.set_rng_seed(7)
        for _ in range(3):
            svi.step(x)

        loss = bound()(by_torch.model, by_torch.guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
        assert len(list(loss.parameters())) == len(before)
        pyro.set_rng_seed(7)
        for _ in range(3):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
    assert all_moved(by_svi, before)
    for (name, a), b in zip(weights(by_svi).items(), weights(by_torch).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_training_lowers_the_loss(likelihood):
    vae, x = make_vae(likelihood), make_data(32)
    svi = SVI(vae.model, vae.guide, adam(), Trace_ELBO())
    before = repeat(lambda: svi.evaluate_loss(x), 20)
    for _ in range(60):
        svi.step(x)
    after = repeat(lambda: svi.evaluate_loss(x), 20)
    assert z_score_between(before, after) > 10


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_elbo_has_the_same_expectation(likelihood):
    vae, x = make_vae(likelihood), make_data()
    objectives = (Trace_ELBO(), TraceMeanField_ELBO(), pv.ELBO("analytic"), pv.ELBO("monte_carlo"))
    draws = [
        repeat(lambda o=o: o.loss(vae.model, vae.guide, x), 150, seed=i)
        for i, o in enumerate(objectives)
    ]
    for other in draws[1:]:
        assert abs(z_score_between(draws[0], other)) < 4.5


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("learning_rate", [1e-3, 0.5])
def test_two_latents_train_in_single_precision_without_nan(likelihood, learning_rate):
    vae, x = make_vae(likelihood).float(), make_data(64).float()
    objective = pv.ELBO()
    optimizer = torch.optim.Adam(vae.parameters(), lr=learning_rate)
    for _ in range(60):
        optimizer.zero_grad()
        objective.differentiable_loss(vae.model, vae.guide, x).backward()
        optimizer.step()
        assert all(p.grad.isfinite().all() and p.isfinite().all() for p in vae.parameters())


# --- the parameter store -----------------------------------------------------------------------


def test_two_vaes_do_not_disturb_each_other():
    x = make_data()
    alone = make_vae()
    step_alone = SVI(alone.model, alone.guide, adam(), Trace_ELBO()).step
    pyro.set_rng_seed(3)
    step_alone(x)

    first, second = make_vae(), make_vae(seed=1)
    before = weights(second)
    SVI(second.model, second.guide, adam(), Trace_ELBO()).evaluate_loss(x)
    svi = SVI(first.model, first.guide, adam(), Trace_ELBO())
    pyro.set_rng_seed(3)
    svi.step(x)
    assert unmoved(second, before)
    for a, b in zip(alone.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local"])
@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_used_vae_has_a_life_of_its_own(how, local):
    x = make_data()
    with pyro.settings.context(module_local_params=local):
        vae = make_vae()
        svi = SVI(vae.model, vae.guide, adam(), Trace_ELBO())
        svi.step(x)
        twin = how(vae)
        at_copy = weights(vae)
        assert unmoved(twin, at_copy)
        SVI(twin.model, twin.guide, adam(), Trace_ELBO()).step(x)
        assert unmoved(vae, at_copy)
        assert all_moved(twin, at_copy)
        now = weights(twin)
        svi.step(x)
        assert unmoved(twin, now)
        assert all_moved(vae, at_copy)


def test_named_vaes_share_names_and_refuse_to_share_parameters():
    x = make_data()
    first = make_vae(name="mine")
    SVI(first.model, first.guide, adam(), Trace_ELBO()).step(x)
    assert all(name.startswith("mine.") for name in pyro.get_param_store())
    SVI(first.model, first.guide, adam(), Trace_ELBO()).step(x)
    for other in (make_vae(name="mine"), copy.deepcopy(first)):
        for program in (other.model, other.guide):
            with pytest.raises(ParameterStoreError, match=r'another tensor under "mine\.'):
                program(x)
    pyro.clear_param_store()
    other.model(x)
    with pyro.settings.context(module_local_params=True):
        first.model(x)  # nothing is shared there


def test_a_named_vae_takes_over_a_saved_store(tmp_path):
    x = make_data()
    vae = make_vae(name="mine")
    SVI(vae.model, vae.guide, adam(), Trace_ELBO()).step(x)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    other = make_vae(name="mine", seed=1)
    with pytest.raises(ParameterStoreError, match="update_module_params=True"):
        other.guide(x)
    pyro.module("mine.model", other.model, update_module_params=True)
    pyro.module("mine.guide", other.guide, update_module_params=True)
    assert unmoved(other, weights(vae))
    SVI(other.model, other.guide, adam(), Trace_ELBO()).step(x)
    assert all_moved(other, weights(vae))


def test_a_part_replaced_after_a_step_is_the_part_that_trains():
    x, vae = make_data(), make_vae()
    svi = SVI(vae.model, vae.guide, adam(), Trace_ELBO())
    svi.step(x)
    vae.model.likelihood = make_vae(seed=1).likelihood
    vae.guide.load_state_dict(make_vae(seed=1).guide.state_dict(), assign=True)
    before = weights(vae)
    svi.step(x)
    assert all_moved(vae, before)


def test_parameters_in_another_memory_order_train():
    x, vae = make_data(), make_vae()
    last = vae.likelihood.network.layers[-1]
    last.weight = nn.Parameter(last.weight.detach().t().contiguous().t())
    assert not last.weight.is_contiguous()
    before = weights(vae)
    SVI(vae.model, vae.guide, adam(), Trace_ELBO()).step(x)
    assert all_moved(vae, before)


def test_frozen_parameters_stay_and_say_nothing():
    x, vae = make_data(), make_vae()
    vae.likelihood.requires_grad_(False)
    before = weights(vae.likelihood)
    svi = SVI(vae.model, vae.guide, adam(), Trace_ELBO())
    svi.step(x)  # pyro.module would warn here, and a warning is an error
    assert unmoved(vae.likelihood, before)
    assert not any("likelihood" in name for name in pyro.get_param_store())


class EncodedPrior(nn.Module):
    """A prior that shares the encoder, as the VampPrior does."""

    def __init__(self, posterior):
        super().__init__()
        self.posterior = posterior
        self.pseudo_input = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, context=None):
        return self.posterior(self.pseudo_input)


@pytest.mark.parametrize("bound", BOUNDS)
def test_shared_parameters_move_once(bound):
    x = make_data()
    results = []
    for form in ("svi", "torch"):
        vae = make_vae()
        vae = pv.VAE(EncodedPrior(vae.posterior), vae.likelihood, vae.posterior)
        pyro.set_rng_seed(2)
        if form == "svi":
            SVI(vae.model, vae.guide, adam(), bound()).step(x)
        else:
            optimizer = torch.optim.Adam(vae.parameters(), lr=0.01)
            bound()(vae.model, vae.guide)(x).backward()
            optimizer.step()
        results.append(weights(vae))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], msg=name)


def test_the_store_may_be_scoped():
    x, vae = make_data(), make_vae()
    with pyro.get_param_store().scope():
        SVI(vae.model, vae.guide, adam(), Trace_ELBO()).step(x)
    assert not pyro.get_param_store()
    before = weights(vae)
    SVI(vae.model, vae.guide, adam(), Trace_ELBO()).step(x)
    assert all_moved(vae, before)


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local"])
def test_state_dict_round_trip(local):
    x = make_data()
    with pyro.settings.context(module_local_params=local):
        vae, other = make_vae(), make_vae(seed=1)
        svi = SVI(vae.model, vae.guide, adam(), Trace_ELBO())
        other_svi = SVI(other.model, other.guide, adam(), Trace_ELBO())
        for script in (svi, other_svi):
            script.step(x)
        other.load_state_dict(vae.state_dict())
        for script in (svi, other_svi):
            pyro.set_rng_seed(9)
            assert script.evaluate_loss(x) == pytest.approx(svi_loss(vae, x), rel=1e-12)
        before = weights(other)
        other_svi.step(x)
        assert all_moved(other, before)
        whole = Trace_ELBO()(vae.model, vae.guide)
        assert set(whole.state_dict()) == set(vae.state_dict())


def svi_loss(vae, x) -> float:
    pyro.set_rng_seed(9)
    return Trace_ELBO().loss(vae.model, vae.guide, x)


# --- parts, shapes, refusals -------------------------------------------------------------------


def test_any_callable_serves_as_a_part():
    vae = pv.VAE(
        prior=lambda: dist.Laplace(torch.zeros(LATENT), 1.0).to_event(1),
        likelihood=lambda z: dist.Normal(z.repeat(1, 3), 1.0).to_event(1),
        posterior=lambda x: dist.Normal(x[..., :LATENT], 1.0).to_event(1),
    )
    x = make_data()
    vae.check_shape(x)
    losses = []
    for objective in (Trace_ELBO(), pv.ELBO("monte_carlo")):
        pyro.set_rng_seed(0)
        losses.append(objective.loss(vae.model, vae.guide, x))
    assert losses[0] == pytest.approx(losses[1])
    assert vae.generate(4, seed=0).mean.shape == (4, FEATURES)


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (dist.Normal(torch.zeros(LATENT), 1.0).to_event(1), r"Independent returned .*lambda: p"),
        (lambda: torch.zeros(LATENT), r"<lambda> returned a torch\.Tensor"),
        (lambda: torch.distributions.Normal(0.0, 1.0), r"torch\.distributions.*\.Normal"),
    ],
)
def test_a_part_that_returns_no_distribution_is_named(prior, match):
    vae, x = make_vae(), make_data()
    wrong = pv.VAE(prior, vae.likelihood, vae.posterior)
    for run in (lambda: pv.ELBO().loss(wrong.model, wrong.guide, x), lambda: wrong.check_shape(x)):
        with pytest.raises(ConfigError, match=match):
            run()


@pytest.mark.parametrize("training", [True, False])
def test_generating_is_evaluation(training):
    """Neither dropout nor the statistics of a batch, which it leaves as they are."""
    layers = [nn.Linear(LATENT, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, FEATURES)]
    vae = make_vae()
    vae.model.likelihood = pv.likelihoods.Bernoulli(nn.Sequential(*layers))
    vae.train(training)
    before = copy.deepcopy(vae.state_dict())
    generated = vae.generate(1, seed=0).mean
    assert all(module.training == training for module in vae.modules())
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    vae.eval()
    assert torch.equal(vae.generate(1, seed=0).mean, generated)


def test_encode_decode_and_generate():
    vae, x = make_vae(), make_data()
    assert vae.encode(x).rsample((3,)).shape == (3, 8, LATENT)
    assert vae.decode(torch.zeros(3, 8, LATENT)).sample().shape == (3, 8, FEATURES)
    state = torch.get_rng_state()
    generated = vae.generate(5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generated.mean, vae.generate(5, seed=1).mean)
    assert not torch.equal(generated.mean, vae.generate(5, seed=2).mean)
    assert not torch.equal(generated.mean, vae.generate(5).mean)
    assert generated.mean.shape == (5, FEATURES)
    assert not generated.mean.requires_grad


def make_conditional() -> pv.VAE:
    class ContextPrior(nn.Module):
        def forward(self, context=None):
            return dist.Normal(context[..., :LATENT], 1.0).to_event(1)

    return pv.VAE(
        ContextPrior(),
        pv.likelihoods.Bernoulli(pv.networks.MLP(LATENT + 3, [5], FEATURES)),
        pv.posteriors.DiagonalNormal(pv.networks.MLP(FEATURES + 3, [5], 2 * LATENT)),
    )


def test_parts_that_take_no_context_are_called_without_one():
    """Counts with an offset: the context is the likelihood's alone."""
    q = pv.posteriors.DiagonalNormal(pv.networks.MLP(FEATURES, [5], 2 * LATENT))
    likelihood = pv.likelihoods.Poisson(pv.networks.MLP(LATENT, [5], FEATURES), offset=True)
    x, log_exposure = torch.ones(8, FEATURES), torch.linspace(0, 3, 8).unsqueeze(1)

    def posterior(x):
        return q(x)

    def laplace():
        return dist.Laplace(torch.zeros(LATENT), 1.0).to_event(1)

    vamp = pv.priors.VampPrior(posterior, 3, torch.rand(3, FEATURES))
    for prior in (laplace, vamp):
        vae = pv.VAE(prior, likelihood, posterior)
        vae.check_shape(x, log_exposure)
        assert pv.IWAE(2).loss(vae.model, vae.guide, x, log_exposure) > 0
        z = vae.encode(x, log_exposure).sample()
        ratio = vae.decode(z, log_exposure).mean / vae.decode(z, 0 * log_exposure).mean
        torch.testing.assert_close(ratio, log_exposure.exp().expand_as(ratio))
        assert vae.generate(8, log_exposure, seed=0).mean.shape == (8, FEATURES)


def test_context_reaches_all_three_parts():
    vae, x = make_conditional(), make_data()
    context = torch.arange(24.0).reshape(8, 3)
    vae.check_shape(x, context)
    for objective in (Trace_ELBO(), pv.ELBO(), pv.IWAE(3)):
        assert objective.loss(vae.model, vae.guide, x, context) > 0
    assert vae.generate(8, context, seed=0).mean.shape == (8, FEATURES)
    with pytest.raises(ShapeError, match="5 samples need a context of as many rows"):
        vae.generate(5, context)


def test_check_shape_holds_the_parts_against_each_other():
    x = make_data()
    vae = make_vae()
    vae.likelihood.network.layers[0].eval()
    modes = [module.training for module in vae.modules()]
    state = torch.get_rng_state()
    vae.check_shape(x)
    assert [module.training for module in vae.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ShapeError, match="takes vectors of 6 values"):
        vae.check_shape(x[:, :4])
    wide = pv.VAE(vae.prior, make_vae().likelihood, vae.posterior)
    wide.model.likelihood = pv.likelihoods.Bernoulli(pv.networks.MLP(LATENT, [], 7))
    with pytest.raises(ShapeError, match=r"data of shape \(7,\), got data of shape \(6,\)"):
        wide.check_shape(x)
    prior = pv.priors.StandardNormal(LATENT + 1)
    with pytest.raises(ShapeError, match=r"latent vectors of shape \(2,\), the prior over \(3,\)"):
        pv.VAE(prior, vae.likelihood, vae.posterior).check_shape(x)


def test_check_refuses_data_by_value_and_place():
    vae, x = make_vae(), make_data()
    vae.check(x)
    x[3, 1] = 0.5
    with pytest.raises(SupportError, match=r"x\[3, 1\] = 0.5 \(row 3, column 1\)"):
        vae.check(x)
    x[2, 4] = float("nan")
    with pytest.raises(DataError, match=r"x\[2, 4\] = nan"):
        vae.check(x)
    with pytest.raises(DataError, match="finite"):
        pv.VAE(vae.prior, lambda z: None, vae.posterior).check(x)


# --- the bounded log-variance ------------------------------------------------------------------


def test_smooth_clamp_is_its_equation_and_the_identity_inside():
    x = np.linspace(-60, 60, 241)
    below = -15 + np.logaddexp(0, x + 15)
    expected = 10 - np.logaddexp(0, 10 - below)
    ours = pv.posteriors.smooth_clamp(torch.as_tensor(x), -15.0, 10.0).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
    inside = (x > -5) & (x < 1)
    np.testing.assert_allclose(ours[inside], x[inside], atol=2e-4)
    assert (np.diff(ours) >= 0).all()
    assert ours.min() > -15.001
    assert ours.max() <= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e8, 1e30])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_log_variance_is_too_extreme(dtype, size, sign):
    log_variance = torch.full((3, LATENT), sign * size, dtype=dtype, requires_grad=True)
    outputs = torch.cat([torch.zeros(3, LATENT, dtype=dtype), log_variance], -1)
    q = pv.posteriors.DiagonalNormal(nn.Identity())(outputs)
    assert (q.stddev > 5e-4).all()
    assert (q.stddev < 150).all()
    p = dist.Normal(torch.zeros(LATENT, dtype=dtype), 1.0).to_event(1)
    torch.manual_seed(0)
    z = q.rsample()
    loss = torch.distributions.kl_divergence(q, p) + q.log_prob(z) - p.log_prob(z)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_variance.grad.isfinite().all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_weights_far_astray_leave_loss_and_gradients_finite(likelihood):
    vae, x = make_vae(likelihood).float(), make_data().float()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1e4)
    for objective in (pv.ELBO(), pv.ELBO("monte_carlo"), pv.IWAE(3), pv.IWAE(3, "dreg")):
        vae.zero_grad()
        loss = objective.differentiable_loss(vae.model, vae.guide, x)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in vae.parameters())
