"""Joined products compute what their layers compute, and hold no weight twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayapp.models.products.joined import (
    JoinedPart,
    Products,
    is_product,
    join,
    named_weights,
    product_of,
    put,
    unpack,
)
from rayapp.models.products.packed import PackedLinear

CPU_TYPES = [torch.float32, torch.bfloat16]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def three_layers(dtype=torch.float32, *, bias=False):
    torch.manual_seed(0)
    return [nn.Linear(40, n, bias=bias).to(dtype).requires_grad_(False) for n in (24, 8, 16)]


class Triple(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.a, self.b, self.c = layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_joined_product_is_its_layers_side_by_side(dtype, bias):
    layers, plain = three_layers(dtype, bias=bias), three_layers(dtype, bias=bias)
    products = Products(join(layers))
    close = CLOSE if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for shape in ((40,), (3, 40), (2, 5, 40)):
        x = torch.randn(shape, dtype=dtype)
        wanted = [layer(x) for layer in plain]
        torch.testing.assert_close(products.side_by_side(x), torch.cat(wanted, -1), **close)
        for found, one in zip(products.apart(x), wanted, strict=True):
            torch.testing.assert_close(found, one, **close)


@pytest.mark.parametrize("dtype", CPU_TYPES)
def test_a_part_alone_is_its_layer(dtype):
    plain, parts = three_layers(dtype, bias=True), join(three_layers(dtype, bias=True))
    x = torch.randn(4, 40, dtype=dtype)
    for part, layer in zip(parts, plain, strict=True):
        assert isinstance(part, JoinedPart)
        assert torch.equal(part.weight, layer.weight)
        assert torch.equal(part.bias, layer.bias)
        assert torch.equal(part(x), layer(x))
        assert torch.equal(product_of(part)(x), layer(x))
        assert set(part.state_dict()) == set(layer.state_dict())


def test_plain_weights_are_views_of_one_tensor_and_stay_parameters():
    layers = join(three_layers(torch.float16, bias=True))
    assert all(type(layer) is nn.Linear for layer in layers)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    assert len(list(Triple(layers).parameters())) == 6
    assert Products(layers)._joined is not None
    assert Products([layers[1], layers[0], layers[2]])._joined is None, "the order counts"


def test_layers_that_only_look_adjacent_are_not_joined():
    layers = three_layers()
    assert Products(layers)._joined is None
    layers = join(three_layers(torch.float16))
    layers[1].weight = nn.Parameter(layers[1].weight.clone(), requires_grad=False)
    x = torch.randn(2, 40).half()
    products = Products(layers)
    assert products._joined is None
    wanted = torch.cat([layer(x) for layer in layers], -1)
    assert torch.equal(products.side_by_side(x), wanted)


def test_a_group_with_a_stranger_runs_one_by_one():
    parts = join(three_layers())
    other = PackedLinear(three_layers()[1])
    x = torch.randn(2, 40)
    found = Products([parts[0], other, parts[2]]).side_by_side(x)
    torch.testing.assert_close(found, Products(parts).side_by_side(x), **CLOSE)


def test_other_layers_are_no_products():
    class Doubled(nn.Linear):
        pass

    assert all(is_product(layer) for layer in (*join(three_layers()), nn.Linear(2, 2)))
    assert not is_product(Doubled(2, 2))
    assert not is_product(nn.Identity())


def test_unpacking_and_naming_parts():
    plain, model = Triple(three_layers(bias=True)), Triple(join(three_layers(bias=True)))
    named = dict(named_weights(model))
    assert named.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(named[name], tensor) for name, tensor in plain.named_parameters())
    unpack(model, ["b"])
    assert [type(layer) for layer in (model.a, model.b)] == [JoinedPart, nn.Linear]
    unpack(model)
    assert torch.equal(model.c.weight, plain.c.weight)
    put(model, "a", nn.Identity())
    assert isinstance(model.a, nn.Identity)
