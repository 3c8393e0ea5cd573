"""Which engine is believed to have computed the beginning of a prompt."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.messages import AdapterRef, Route, SamplingParams
from loraserve.router.prefixes import BLOCK_TOKENS, MAX_BLOCKS, MAX_ENGINES, PrefixMemory
from loraserve.testing.reports import adapter_ref

PIRATE = adapter_ref(1)


def prompt(*blocks: int, rest: int = 0, adapter: AdapterRef | None = None) -> Route:
    """Blocks of equal tokens each, and a part of one."""
    tokens = tuple(number for number in blocks for _ in range(BLOCK_TOKENS))
    return Route(
        request_id="r1",
        gateway="gateway-0",
        prompt_tokens=(*tokens, *range(rest)),
        sampling=SamplingParams(max_tokens=1),
        adapter=adapter,
    )


def test_whole_blocks_from_the_beginning_are_found() -> None:
    memory = PrefixMemory()
    memory.record_sent("e0", prompt(1, 2, 3, rest=5))
    memory.record_sent("e1", prompt(1))
    assert memory.cached_tokens(prompt(1, 2, 9, rest=1)) == {"e0": 2 * BLOCK_TOKENS, "e1": BLOCK_TOKENS}
    assert memory.cached_tokens(prompt(2, 3)) == {}
    assert memory.cached_tokens(prompt(rest=5)) == {}


def test_one_token_is_always_computed() -> None:
    memory = PrefixMemory()
    memory.record_sent("e0", prompt(1))
    assert memory.cached_tokens(prompt(1)) == {"e0": BLOCK_TOKENS - 1}


def test_the_kv_of_another_adapter_is_of_no_use() -> None:
    memory = PrefixMemory()
    memory.record_sent("e0", prompt(1, adapter=PIRATE))
    assert memory.cached_tokens(prompt(1)) == {}
    assert memory.cached_tokens(prompt(1, adapter=adapter_ref(2))) == {}
    assert memory.cached_tokens(prompt(1, rest=9, adapter=PIRATE)) == {"e0": BLOCK_TOKENS}


def test_an_engine_that_lost_its_cache_has_nothing_until_it_is_sent_more() -> None:
    memory = PrefixMemory()
    for engine in ("e0", "e1"):
        memory.record_sent(engine, prompt(1, 2))
    memory.forget("e0")
    memory.forget("unknown")
    assert memory.cached_tokens(prompt(1, rest=1)) == {"e1": BLOCK_TOKENS}
    memory.record_sent("e0", prompt(1))
    assert memory.cached_tokens(prompt(1, 2, rest=1)) == {"e0": BLOCK_TOKENS, "e1": 2 * BLOCK_TOKENS}


def test_what_was_found_is_not_kept_past_what_happens() -> None:
    memory, request = PrefixMemory(), prompt(1, rest=1)
    assert memory.cached_tokens(request) == {}
    memory.record_sent("e0", request)
    assert memory.cached_tokens(request) == {"e0": BLOCK_TOKENS}
    memory.forget("e0")
    assert memory.cached_tokens(request) == {}


def test_what_was_used_last_is_kept_and_beginnings_before_ends() -> None:
    memory = PrefixMemory(max_prefixes=3)
    memory.record_sent("e0", prompt(1, 2))
    memory.record_sent("e0", prompt(7, 8))
    assert memory.cached_tokens(prompt(1, 2)) == {"e0": BLOCK_TOKENS}
    memory.record_sent("e0", prompt(1))
    memory.record_sent("e0", prompt(5))
    assert memory.cached_tokens(prompt(1, rest=1)) == {"e0": BLOCK_TOKENS}
    assert len(memory) == 3


def test_a_prefix_names_its_latest_engines_only() -> None:
    memory = PrefixMemory()
    for number in range(MAX_ENGINES + 2):
        memory.record_sent(f"e{number}", prompt(1))
    assert set(memory.cached_tokens(prompt(1, rest=1))) == {f"e{n}" for n in range(2, MAX_ENGINES + 2)}


def test_of_a_long_prompt_a_bounded_part_is_remembered() -> None:
    memory = PrefixMemory()
    long = prompt(*range(MAX_BLOCKS + 5))
    memory.record_sent("e0", long)
    assert memory.cached_tokens(prompt(*range(MAX_BLOCKS + 5), rest=1)) == {"e0": MAX_BLOCKS * BLOCK_TOKENS}


actions = st.tuples(
    st.sampled_from(["sent", "forget", "look"]),
    st.sampled_from(["e0", "e1", "e2"]),
    st.lists(st.integers(0, 2), max_size=4),
    st.sampled_from([None, PIRATE]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(actions, max_size=40))
def test_it_agrees_with_a_plain_list_of_what_was_sent(steps) -> None:
    memory, sent = PrefixMemory(), []
    for action, engine, blocks, adapter in steps:
        request = prompt(*blocks, rest=1, adapter=adapter)
        if action == "sent":
            memory.record_sent(engine, request)
            sent.append((engine, blocks, adapter))
        elif action == "forget":
            memory.forget(engine)
            sent = [s for s in sent if s[0] != engine]
        expected: dict[str, int] = {}
        for name, others, its in sent:
            same = 0
            while its == adapter and same < min(len(blocks), len(others)) and blocks[same] == others[same]:
                same += 1
            expected[name] = max(expected.get(name, 0), same * BLOCK_TOKENS)
        assert memory.cached_tokens(request) == {e: tokens for e, tokens in expected.items() if tokens}
        memory.validate()
