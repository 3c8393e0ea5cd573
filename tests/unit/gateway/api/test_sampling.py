"""Output limits, and the sampling parameters sent to the engine."""

import json
from typing import Any

import pytest

from loraserve.gateway.api.limits import output_limit
from loraserve.gateway.api.schema import (
    INT64,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    decode_request,
    sampling_params,
    stop_rules,
)
from loraserve.gateway.errors import ApiError
from loraserve.messages.sampling import FIELD_TYPES, RANGES, range_error


def request_of(**fields: Any) -> ChatRequest:
    return decode_request(json.dumps(fields).encode(), ChatRequest)


def params(choice: int = 0, seed: int = 5, **fields: Any) -> Any:
    return sampling_params(request_of(**fields), 10, None, seed, choice)


def test_the_output_limit_is_the_requested_or_the_largest_that_fits() -> None:
    assert output_limit(7, 10, 100, 0, "prompt") == 7
    assert output_limit(90, 10, 100, 0, "prompt") == 90
    assert output_limit(None, 10, 100, 0, "prompt") == 90
    assert output_limit(None, 10, 100, 16, "prompt") == 16
    assert output_limit(None, 95, 100, 16, "prompt") == 5


@pytest.mark.parametrize(("wanted", "prompt"), [(91, 10), (None, 100), (1, 100), (None, 500)])
def test_an_overflow_has_the_text_that_clients_search_for(wanted: int | None, prompt: int) -> None:
    with pytest.raises(ApiError, match=r"^This model's maximum context length is 100 tokens\.") as caught:
        output_limit(wanted, prompt, 100, 0, "messages")
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ApiError, match="no tokens"):
        output_limit(5, 0, 100, 0, "prompt")


def test_defaults_are_those_of_openai() -> None:
    sampling = params()
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.max_tokens, sampling.min_tokens) == (1.0, 10, 0)
    assert params(temperature=0.0).temperature == 0.0
    assert params(top_k=-1).top_k == 0


def test_choices_differ_by_seed_which_stays_a_64_bit_number() -> None:
    assert [params(choice).seed for choice in range(3)] == [5, 6, 7]
    for seed in (-1, -INT64, INT64 - 1):
        assert 0 <= params(1, seed).seed < INT64


def test_min_tokens_must_not_exceed_the_output_limit() -> None:
    with pytest.raises(ApiError) as caught:
        params(min_tokens=11)
    assert caught.value.param == "min_tokens"


def test_ignore_eos_keeps_the_stops_of_the_client() -> None:
    request = request_of(ignore_eos=True, stop_token_ids=[3], stop="x")
    sampling = sampling_params(request, 10, None, 5, 0)
    assert (sampling.ignore_eos, sampling.stop_token_ids, stop_rules(request).strings) == (True, (3,), ("x",))


@pytest.mark.parametrize("name", sorted(set(FIELD_TYPES) - {"max_tokens", "seed", "logprobs"}))
@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_sampling_parameter_is_accepted_and_passed_on(kind: type[GenerationRequest], name: str) -> None:
    """A new field of SamplingParams needs no code in the gateway."""
    value = {"stop_token_ids": (3,), "ignore_eos": True, "min_tokens": 2, "top_k": 4}.get(name, 0.5)
    request = decode_request(json.dumps({name: value}).encode(), kind)
    assert getattr(sampling_params(request, 10, None, 5, 0), name) == value


@pytest.mark.parametrize("name", sorted(RANGES))
def test_the_range_of_every_parameter_is_checked(name: str) -> None:
    allowed = RANGES[name]
    assert range_error(allowed.lowest if not allowed.above else allowed.lowest + 0.5, allowed) is None
    assert range_error(None, allowed) is None
    below = allowed.lowest if allowed.above else allowed.lowest - 1
    assert f"found {below}" in str(range_error(below, allowed))
    if allowed.highest is not None:
        assert range_error(allowed.highest, allowed) is None
        assert f"at most {allowed.highest:g}" in str(range_error(allowed.highest * 2, allowed))
