"""The stop contract, with the engine's scheduler and the gateway's output code run together."""

import json
from typing import Any

import pytest

from loraserve.engine.schedule.events import Emit, RequestArrived, RunStep, Sampled, StepDone, StepResult
from loraserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from loraserve.gateway.api.schema import ChatRequest, decode_request, sampling_params, stop_rules
from loraserve.gateway.text.detokenize import TokenBytes
from loraserve.gateway.text.output import OutputAssembler, OutputChunk
from loraserve.messages import Admit, TokenDelta
from loraserve.testing.tiny_tokenizer import CHAT_END, byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
EOS = TOKENIZER.token_to_id(CHAT_END) or 0
TOKENS = TokenBytes(TOKENIZER, frozenset({EOS}), json.loads(TOKENIZER.to_str())["decoder"])
LIMITS = SchedulerLimits(
    kv_blocks=64, block_tokens=4, pool_bytes=1 << 20, max_adapters=1, max_running=4, max_waiting=4,
    max_step_tokens=32, max_model_tokens=64, eos_token_ids=frozenset([EOS]),
)  # fmt: skip


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


(BANG,) = ids("!")


def deltas(request: ChatRequest, drawn: list[int], max_tokens: int) -> list[TokenDelta]:
    """Run one request on a scheduler whose model draws these tokens, until it ends."""
    scheduler = Scheduler(LIMITS)
    sampling = sampling_params(request, max_tokens, 0, 0, 0)
    admit = Admit(request_id="r", gateway="gateway-0", prompt_tokens=(1, 2), sampling=sampling)
    sent: list[TokenDelta] = []
    instructions = scheduler.handle(RequestArrived(admit), 0.0)
    for now, token in enumerate(drawn, 1):
        steps = [i.batch for i in instructions if isinstance(i, RunStep)]
        if not steps:
            break
        sampled = Sampled(request_id="r", token=token, logprob=-0.5)
        done = StepResult(step_id=steps[0].step_id, sampled=(sampled,), duration_s=0.01)
        instructions = scheduler.handle(StepDone(done), float(now))
        sent += [i.delta for i in instructions if isinstance(i, Emit)]
    return sent


def answer(drawn: list[int], max_tokens: int = 20, **fields: Any) -> tuple[OutputChunk, int]:
    """Return the whole output of one choice as a client sees it, and its ``completion_tokens``."""
    request = decode_request(json.dumps(fields).encode(), ChatRequest)
    output = OutputAssembler(0, TOKENS.detokenizer(), stop_rules(request))
    chunks = [
        output.feed(delta.tokens, delta.logprobs, delta.finish, delta.stop_reason)
        for delta in deltas(request, drawn, max_tokens)
    ]
    text = "".join(chunk.text for chunk in chunks)
    scored = tuple(one for chunk in chunks for one in chunk.scored)
    assert len(scored) == output.completion_tokens
    last = next(chunk for chunk in chunks if chunk.finish is not None)
    return OutputChunk(0, text, scored, last.finish, last.stop_reason), output.completion_tokens


HELLO = ids("hello")
N = len(HELLO)


@pytest.mark.parametrize(
    ("drawn", "fields", "text", "finish", "stop_reason", "counted"),
    [
        ([*HELLO, EOS], {}, "hello", "stop", None, N + 1),
        ([EOS], {}, "", "stop", None, 1),
        (
            [*HELLO, EOS],
            {"include_stop_str_in_output": True, "skip_special_tokens": True},
            "hello",
            "stop",
            None,
            N + 1,
        ),
        ([*HELLO, BANG], {"stop_token_ids": [BANG]}, "hello", "stop", BANG, N + 1),
        ([BANG], {"stop_token_ids": [BANG]}, "", "stop", BANG, 1),
        (
            [*HELLO, BANG],
            {"stop_token_ids": [BANG], "include_stop_str_in_output": True},
            "hello!",
            "stop",
            BANG,
            N + 1,
        ),
        ([*HELLO, EOS], {"stop_token_ids": [EOS]}, "hello", "stop", None, N + 1),
        ([*HELLO, EOS, BANG], {"ignore_eos": True, "stop_token_ids": [BANG]}, "hello", "stop", BANG, N + 2),
        ([EOS, *HELLO, EOS], {"min_tokens": 1}, "hello", "stop", None, N + 2),
        ([BANG, BANG], {"min_tokens": 1, "stop_token_ids": [BANG]}, "!", "stop", BANG, 2),
        ([*ids("abc!de")], {"stop": "!"}, "abc", "stop", "!", 4),
        ([*ids("abc!de")], {"stop": "!", "include_stop_str_in_output": True}, "abc!", "stop", "!", 4),
        ([*ids("!bc!")], {"stop": "!", "min_tokens": 2}, "!bc", "stop", "!", 4),
    ],
)
def test_how_an_output_ends(
    drawn: list[int], fields: dict[str, Any], text: str, finish: str, stop_reason: str | int | None, counted: int
) -> None:
    output, completion_tokens = answer(drawn, **fields)
    assert (output.text, output.finish, output.stop_reason) == (text, finish, stop_reason)
    assert completion_tokens == counted


def test_a_stop_on_the_last_allowed_token_is_a_stop() -> None:
    output, completion_tokens = answer([*HELLO, EOS], max_tokens=N + 1)
    assert (output.finish, completion_tokens) == ("stop", N + 1)
    output, completion_tokens = answer([*HELLO, EOS], max_tokens=N)
    assert (output.text, output.finish, completion_tokens) == ("hello", "length", N)
