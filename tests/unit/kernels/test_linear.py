"""Products with fp16 weights are close to float64, have equal bits in any batch, and stay inside the result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.kernels.linear import PARTS, TILE, PackedWeight, linear

WIDTHS = (1, TILE - 1, TILE, TILE + 1, 3 * TILE, 2 * PARTS * TILE, 2 * PARTS * TILE + 5)


def make(width: int, depth: int, tokens: int, seed: int = 0) -> tuple[PackedWeight, torch.Tensor, torch.Tensor]:
    """Return a packed weight with a bias, inputs, and the product of the rounded weights in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, x = (
        torch.randn(*shape, generator=generator) for shape in ((width, depth), (width,), (tokens, depth))
    )
    expected = x.double() @ weight.half().double().T + bias.double()
    return PackedWeight(weight, bias), x, expected


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(1, 70), st.integers(1, 30), st.integers(0, 9))
def test_near_float64(width: int, depth: int, tokens: int, seed: int) -> None:
    weight, x, expected = make(width, depth, tokens, seed)
    torch.testing.assert_close(linear(x, weight).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_batch(width: int, threads: int) -> None:
    weight, x, _ = make(width, 300, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([linear(row[None], weight) for row in x])
        torch.set_num_threads(threads)
        for tokens in (2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 40):
            assert torch.equal(linear(x[:tokens].contiguous(), weight), alone[:tokens]), tokens
    finally:
        torch.set_num_threads(before)


def test_the_order_of_summation() -> None:
    """The documented order: bias first, then one input after the other, each with one rounding."""
    depth = 200
    weight, x, _ = make(TILE, depth, 1)
    total = weight.bias[0].double()
    for index in range(depth):
        product = x[0, index].double() * weight.tiles[0, index, 0].double()
        total = (total + product).float().double()
    assert linear(x, weight)[0, 0].item() == total.item()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_call_without_tokens_works(width: int) -> None:
    weight, _, _ = make(width, 8, 1)
    assert linear(torch.empty(0, 8), weight).shape == (0, width)


def test_a_missing_bias_is_zero_and_poison_stays_in_its_row() -> None:
    packed = PackedWeight(torch.ones(TILE + 3, 5), None)
    x = torch.ones(3, 5)
    x[1] = torch.nan
    y = linear(x, packed)
    assert torch.equal(y[[0, 2]], torch.full((2, TILE + 3), 5.0))
    assert y[1].isnan().all()
