"""Scripts written for Pyro's SVI: its interface, its objectives, layers of all kinds."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import pyro_vae as pv
from pyro_vae.compiled import convolutions
from pyro_vae.errors import CompileError, ConfigError

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z.sum(-1, keepdim=True).expand(*z.shape[:-1], 6)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    scale = pyro.param("scale", torch.ones(2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2], scale.exp()).to_event(1))


class Guide(nn.Module):
    """With an encoder of one's own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> None:
        pyro.module("guide", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


class LSTM(nn.Module):
    """The last state of an LSTM over the columns."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.network = nn.LSTM(1, 3, batch_first=True, **options)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.network(x[..., None])[0][:, -1])
        return out


class Doubled(Trace_ELBO):
    """Whose gradients are its own."""

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().loss_and_grads(*args, **kwargs)


class Halved(Doubled):
    """Whose differentiable loss is its own as well."""

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        loss = self.differentiable_loss(*args, **kwargs)
        loss.backward()
        return loss.item()

    def differentiable_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().differentiable_loss(*args, **kwargs) / 2


def steps(kind: Any, model: Any, guide: Any, loss: Any, x: Tensor = X) -> list[float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    options = {} if kind is SVI else {"backend": "aot_eager"}
    made = kind(model, guide, Adam({"lr": 0.05}), loss, **options)
    return [made.step(x) for _ in range(3)]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": False}])
def test_an_lstm(options: dict[str, Any]) -> None:
    found = []
    for kind in (SVI, pv.CompiledSVI):
        torch.manual_seed(1)
        found.append(steps(kind, model, Guide(LSTM(**options)), Trace_ELBO()))
    assert found[1] == pytest.approx(found[0], rel=1e-8)


def test_no_operation_of_onednns_is_in_a_graph() -> None:
    """TorchInductor cannot compile the gradient of its LSTM, of float32."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.manual_seed(1)
    encoder = LSTM().float()
    loss = pv.ELBO()(lambda x: None, lambda x: pyro.factor("f", encoder(x).sum(), has_rsample=True))
    pv.compile(loss, X.float(), backend=backend)
    assert not any("mkldnn" in str(node.target) for node in graphs[0].graph.nodes)
    assert torch._C._get_mkldnn_enabled()


def test_heads_of_attention_are_no_maps() -> None:
    def attend(x: Tensor, weight: Tensor) -> Tensor:
        heads = (x @ weight).view(4, 5, 2, 4).permute(0, 2, 1, 3)
        scores = nn.functional.dropout(heads @ heads.mT, 0.1)
        return (scores @ heads).permute(0, 2, 1, 3).reshape(4, 5, 8).flatten(1)

    graph = make_fx(attend)(torch.randn(4, 5, 8), torch.randn(8, 8))
    before = [node.target for node in graph.graph.nodes]
    convolutions.lay_out(graph)
    assert [node.target for node in graph.graph.nodes] == before


class Checkpointed(nn.Module):
    """A layer whose forward pass is run again in the backward pass, its draws put back."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.network, x, use_reentrant=False)


def test_a_checkpoint_without_draws() -> None:
    found = []
    for kind in (SVI, pv.CompiledSVI):
        torch.manual_seed(1)
        found.append(steps(kind, model, Guide(Checkpointed(0.0)), Trace_ELBO()))
    assert found[1] == pytest.approx(found[0], rel=1e-8)


def test_draws_of_a_checkpoint_are_refused_by_name() -> None:
    with pytest.raises(CompileError, match=r"torch\.utils\.checkpoint"):
        steps(pv.CompiledSVI, model, Guide(Checkpointed(0.5)), Trace_ELBO())


class TestPyrosInterface:
    @pytest.fixture
    def made(self) -> Any:
        return pv.CompiledSVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO(), backend="eager")

    def test_its_loss(self, made: Any) -> None:
        values = []
        for svi in (made, SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())):
            pyro.set_rng_seed(2)
            values.append(svi.loss(model, guide, X))
        assert values[0] == values[1]

    def test_its_gradients(self, made: Any) -> None:
        pyro.set_rng_seed(2)
        loss = made.loss_and_grads(model, guide, X)
        assert pyro.param("scale").unconstrained().grad is not None
        pyro.set_rng_seed(2)
        assert made.loss(model, guide, X) == loss

    def test_another_loss(self, made: Any) -> None:
        before = made.step(X)
        made.loss = lambda *args: 2 * Trace_ELBO().differentiable_loss(*args)
        pyro.set_rng_seed(2)
        twice = made.evaluate_loss(X)
        pyro.set_rng_seed(2)
        assert made.loss(model, guide, X).item() == pytest.approx(twice)
        assert twice != before

    def test_programs_without_sites(self) -> None:
        for kind in (SVI, pv.CompiledSVI):
            assert steps(kind, lambda x: None, lambda x: None, Trace_ELBO()) == [0.0] * 3

    @pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("optim", [Adam({"lr": 0.1}), None])
    def test_no_step_is_taken_without_gradients(self, off: Any, optim: Any) -> None:
        encoder = Guide(nn.Linear(6, 2))
        before = encoder.encoder.weight.detach().clone()
        optim = optim or torch.optim.Adam(encoder.parameters(), 0.1)
        svi = pv.CompiledSVI(model, encoder, optim, Trace_ELBO(), backend="eager")
        with off():
            for take in (lambda: svi.step(X), lambda: svi.steps(X.expand(2, *X.shape))):
                with pytest.raises(ConfigError, match="gradients are off"):
                    take()
        with torch.no_grad():
            assert svi.evaluate_loss(X) > 0
        assert torch.equal(encoder.encoder.weight, before)
        svi.step(X)
        assert not torch.equal(encoder.encoder.weight, before)


class TestLosses:
    def test_gradients_of_its_own_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"Doubled overrides loss_and_grads.*override diff"):
            steps(pv.CompiledSVI, model, guide, Doubled())

    def test_a_differentiable_loss_of_its_own_is_taken(self) -> None:
        assert steps(pv.CompiledSVI, model, guide, Halved())[0] == pytest.approx(
            steps(pv.CompiledSVI, model, guide, Trace_ELBO())[0] / 2
        )

    @pytest.mark.parametrize(
        ("loss", "remedy"),
        [
            (JitTrace_ELBO(), "give Trace_ELBO"),
            (ReweightedWakeSleep(), "WakeSleep for ReweightedWakeSleep"),
        ],
    )
    def test_what_to_use_instead(self, loss: Any, remedy: str) -> None:
        with pytest.raises(ConfigError, match=remedy):
            pv.CompiledSVI(model, guide, Adam({"lr": 0.05}), loss)

    @pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO(), pv.ELBO(), pv.IWAE(3)])
    def test_the_usual_ones_are_taken(self, loss: Any) -> None:
        steps(pv.CompiledSVI, model, guide, loss)


def test_a_number_that_changes_is_told_early() -> None:
    def scaled(x: Tensor, factor: float, other: float) -> None:
        pyro.factor("x", factor * x.sum())

    loss = pv.ELBO()(scaled, lambda x, factor, other: None)
    compiled = pv.compile(loss, backend="eager")
    for factor in (0.25, 0.5, 0.75):
        compiled(X, factor, 1.0)
    with pytest.warns(
        UserWarning, match=r"other values of a Python number \(0\.25, 0\.5, 0\.75, 1"
    ):
        compiled(X, 1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (1, 2, 3):  # another shape is another matter
            compiled(X[:rows], 1.0, 1.0)


class Counts(nn.Module):
    """An encoder with a buffer of a kind that tracing cannot keep."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(6, dtype=torch.float64).to_sparse())
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out((self.graph @ x.T).T)
        return out


class TestWhatFailsOnTheWay:
    """An error of compiling, where the program itself runs, is a CompileError, so that "auto"
    falls back."""

    def test_a_sparse_buffer(self) -> None:
        with pytest.raises(CompileError, match="compiling fails where the program itself does not"):
            steps(pv.CompiledSVI, model, Guide(Counts()), Trace_ELBO())

    def test_an_error_of_the_programs_own_is_its_own(self) -> None:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            steps(pv.CompiledSVI, model, Guide(nn.Linear(5, 2)), Trace_ELBO())

    @pytest.mark.parametrize("compile", ["auto", True])
    def test_in_fit(self, compile: Any) -> None:
        vae = pv.VAE(
            pv.priors.StandardNormal(2),
            pv.likelihoods.Normal(nn.Linear(2, 6), scale=1.0),
            pv.posteriors.DiagonalNormal(nn.Sequential(Counts(), nn.Linear(2, 4))),
        )
        options: dict[str, Any] = {"epochs": 2, "batch_size": 4, "precision": "64-true"}
        if compile is True:
            with pytest.raises(CompileError, match="compiling fails where"):
                pv.fit(vae, X, compile=True, **options)
            return
        with pytest.warns(UserWarning, match="without compiling: compiling fails where") as told:
            run = pv.fit(vae, X, compile="auto", **options)
        assert len([w for w in told if "without compiling" in str(w.message)]) == 1
        assert len(run.metrics) == 2


@pytest.mark.parametrize("validate", [True, False])
def test_a_guide_that_sets_itself_up_begins_where_it_would(validate: bool) -> None:
    """At the median of draws from the prior, of which it asks whether it is a number."""

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(10.0, 0.1))
        pyro.sample("x", dist.Normal(loc, 1.0).expand([3]).to_event(1), obs=x)

    found = []
    for kind in (SVI, pv.CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with pyro.validation_enabled(validate):
            guide = AutoDelta(model)
            kind(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).step(torch.ones(3))
        found.append(guide.median()["loc"])
    assert found[0] > 9
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "choose",
    [lambda x: 2.0 if x.sum() > 0 else 3.0, lambda x: x.sum().item(), lambda x: x.tolist()[0]],
    ids=["if", "item", "tolist"],
)
def test_what_is_refused_stays_so_where_the_program_catches_it(choose: Any) -> None:
    def model(x: Tensor) -> None:
        try:
            factor = choose(x)
        except RuntimeError:
            factor = 2.0
        pyro.factor("x", factor * x.sum())

    with pytest.raises(CompileError, match=r"choose\(x\)|if x.sum|item|tolist"):
        pv.compile(pv.ELBO()(model, lambda _: None), torch.ones(2), backend="eager")
