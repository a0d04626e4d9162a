"""Networks: shapes for any leading dimensions, what an image becomes, the output bias."""

import numpy as np
import pytest
import torch
from torch import nn

from pyro_vae import networks, posteriors, priors
from pyro_vae.errors import ConfigError, ShapeError
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder, GatedMLP, concatenate
from pyro_vae.seeding import derive, seeded

SIZES = [(1, 1), (2, 3), (5, 5), (7, 10), (8, 8), (9, 13), (28, 28)]
NETWORKS = {
    "affine": lambda: MLP(4, [], 6),
    "mlp": lambda: MLP(4, [5, 3], 6, nn.ReLU),
    "gated": lambda: GatedMLP(4, [5, 3], 6),
    "encoder": lambda: ConvEncoder((2, 2), [3], 6),
    "decoder": lambda: ConvDecoder(4, [3], (2, 3)),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]()


@pytest.mark.parametrize("leading", [(), (0,), (1,), (7,), (3, 1, 7)])
def test_leading_dimensions_pass_through(network, leading):
    x = torch.randn(*leading, network.in_features)
    y = network(x)
    assert y.shape == (*leading, network.out_features)
    for row, out in zip(x.reshape(-1, 4), y.reshape(-1, 6), strict=True):
        torch.testing.assert_close(network(row), out)


@pytest.mark.parametrize("shape", [(5,), (4, 1), ()])
def test_input_of_another_size(network, shape):
    with pytest.raises(ShapeError, match="takes vectors of 4 values, got an input of shape"):
        network(torch.zeros(shape))


def test_state_dict_names_are_the_layers(network):
    assert all(name.startswith("layers.") for name in network.state_dict())


@pytest.mark.parametrize(
    ("activation", "bend"), [(nn.Tanh, np.tanh), (nn.ReLU, lambda a: np.maximum(a, 0))]
)
def test_mlp_is_its_equation(activation, bend):
    net = MLP(4, [5], 6, activation)
    first, last = (
        {k: v.detach().numpy() for k, v in net.layers[i].named_parameters()} for i in (0, 2)
    )
    x = torch.randn(3, 4)
    hidden = bend(x.numpy() @ first["weight"].T + first["bias"])
    expected = hidden @ last["weight"].T + last["bias"]
    np.testing.assert_allclose(net(x).detach(), expected, rtol=1e-12)


def test_gated_layer_is_its_equation():
    net = GatedMLP(4, [5], 6)
    first, last = ([p.detach().numpy() for p in net.layers[i].parameters()] for i in (0, 1))
    x = torch.randn(3, 4)
    both = x.numpy() @ first[0].T + first[1]
    hidden = both[:, :5] / (1 + np.exp(-both[:, 5:]))
    np.testing.assert_allclose(net(x).detach(), hidden @ last[0].T + last[1], rtol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("colours", [1, 3])
def test_convolutions_fit_images_of_any_size(size, depth, colours):
    shape = (colours, *size)
    features = colours * size[0] * size[1]
    encoder = ConvEncoder(shape, [4] * depth, 6)
    decoder = ConvDecoder(2, [4] * depth, shape)
    assert encoder.in_features == decoder.out_features == features
    image = decoder(encoder(torch.randn(2, 3, features))[..., :2])
    assert image.shape == (2, 3, features)
    # every pixel of the input counts, and every pixel of the output is reached
    x = torch.randn(features, requires_grad=True)
    encoder(x).sum().backward()
    assert (x.grad != 0).all()
    assert decoder(torch.randn(2, 2)).std(0).min() > 0


@pytest.mark.parametrize(
    "make", [lambda: ConvEncoder((4, 4), [3], 2), lambda: ConvDecoder(3, [2], (4, 4))]
)
def test_convolutions_are_followed_by_a_silu(make):
    net = make()
    linear = nn.Sequential(*(layer for layer in net.layers if not isinstance(layer, nn.SiLU)))
    x = torch.randn(5, net.in_features)
    assert (net(x) - linear(x).flatten(1)).abs().min() > 1e-6
    bent = x
    for layer in net.layers:
        bent = bent / (1 + (-bent).exp()) if isinstance(layer, nn.SiLU) else layer(bent)
    torch.testing.assert_close(net(x), bent.flatten(1))


def test_an_image_without_channels_has_one():
    assert ConvEncoder((5, 4), [2], 3).in_features == 20
    assert ConvDecoder(3, [2], (5, 4)).image_shape == (1, 5, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvEncoder((5,), [2], 3),
        lambda: ConvDecoder(3, [2], (1, 1, 5, 5)),
        lambda: ConvDecoder(3, [], (5, 5)),
    ],
)
def test_images_that_are_none(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("kind", ["affine", "mlp", "gated"])
@pytest.mark.parametrize("given", [6, 3])
def test_output_bias(kind, given):
    net = NETWORKS[kind]()
    before = net(torch.zeros(4)) - net.layers[-1].bias
    rest = net.layers[-1].bias[given:].clone()
    bias = torch.arange(given, dtype=torch.float64)
    net.set_output_bias(bias)
    torch.testing.assert_close(net(torch.zeros(4)) - before, torch.cat([bias, rest]))
    assert net.layers[-1].bias.requires_grad


@pytest.mark.parametrize("given", [2, 1])
def test_output_bias_of_a_decoder_of_images_is_one_a_channel(given):
    net = ConvDecoder(2, [3], (2, 4, 5))
    rest = net.layers[-1].bias[given:].clone()
    bias = torch.arange(given * 20.0, dtype=torch.float64)
    net.set_output_bias(bias)
    expected = torch.cat([bias.reshape(given, 20).mean(1), rest])
    torch.testing.assert_close(net.layers[-1].bias, expected)


def test_concatenate_broadcasts_the_context():
    x, context = torch.randn(5, 7, 2), torch.randn(7, 3)
    assert concatenate(x, None) is x
    both = concatenate(x, context)
    assert both.shape == (5, 7, 5)
    assert torch.equal(both[3, :, 2:], context)
    assert torch.equal(both[..., :2], x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: networks.MLP(0, [3], 2),
        lambda: networks.MLP(3, [-1], 2),
        lambda: networks.GatedMLP(3, [2], 0),
        lambda: networks.MLP(3, [2.5], 2),
        lambda: networks.ConvEncoder((8, 8), [0], 4),
        lambda: networks.ConvDecoder(2, [4, -4], (8, 8)),
        lambda: priors.StandardNormal(0),
    ],
)
def test_sizes_that_make_no_network(make):
    with pytest.raises(ConfigError, match="at least 1, got"):
        make()


def test_an_odd_number_of_outputs_makes_no_diagonal_normal():
    posterior = posteriors.DiagonalNormal(networks.MLP(3, [4], 5))
    with pytest.raises(ShapeError, match="5 network outputs"):
        posterior(torch.zeros(2, 3))


@pytest.mark.parametrize("seed", [-1, 1.5, "a"])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(ConfigError, match="a seed must be"), seeded(seed):
        pass
    with pytest.raises(ConfigError, match="a seed must be"):
        derive(seed, 1)
