import pytest
import torch

from loraserve.engine.model.linear import Fp16Linear, Linear, make_linear, pick_backend
from loraserve.errors import ConfigError


def test_float32_is_exact_and_can_be_selected() -> None:
    weight, bias, x = torch.randn(5, 7), torch.randn(5), torch.randn(3, 7)
    linear = make_linear(weight, bias, pick_backend("float32"))
    assert type(linear) is Linear
    assert torch.equal(linear(x), torch.nn.functional.linear(x, weight, bias))


def test_auto_selects_fp16_if_it_runs() -> None:
    assert pick_backend("auto") == "fp16"


@pytest.mark.parametrize(("rows", "width"), [(960, 576), (33, 47), (1, 1), (3072, 64)])
def test_fp16_rounds_only_the_weights(rows: int, width: int) -> None:
    weight, bias, x = torch.randn(rows, width), torch.randn(rows), torch.randn(9, width)
    linear = make_linear(weight, bias, "fp16")
    assert type(linear) is Fp16Linear
    expected = torch.nn.functional.linear(x.double(), weight.half().double(), bias.double())
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(960, 576), (33, 47), (576, 1536)])
def test_fp16_rows_have_the_same_bits_in_any_batch(rows: int, width: int) -> None:
    before = torch.get_num_threads()
    linear = make_linear(torch.randn(rows, width), None, "fp16")
    x = torch.randn(131, width)
    try:
        torch.set_num_threads(1)
        alone = torch.cat([linear(row[None]) for row in x])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in (2, 3, 4, 5, 6, 7, 8, 13, 16, 64, 131):
                assert torch.equal(linear(x[:count].contiguous()), alone[:count]), (threads, count)
    finally:
        torch.set_num_threads(before)


def test_weights_beyond_fp16_stay_float32() -> None:
    weight = torch.full((4, 4), 1e5)
    linear = make_linear(weight, None, "fp16")
    assert type(linear) is Linear
    assert torch.equal(linear(torch.ones(1, 4)), torch.full((1, 4), 4e5))


def test_selecting_fp16_is_refused_if_it_does_not_run() -> None:
    assert pick_backend("auto", can_run_fp16=lambda: False) == "float32"
    with pytest.raises(ConfigError, match=r"engine\.weights=fp16: .* set engine\.weights to auto"):
        pick_backend("fp16", can_run_fp16=lambda: False)
