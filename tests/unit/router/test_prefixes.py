"""Which engines are believed to have a prefix of a prompt cached."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.messages import AdapterRef, Route, SamplingParams
from loraserve.router.prefixes import BLOCK_TOKENS, MAX_BLOCKS, MAX_ENGINES, PrefixMemory
from loraserve.testing.reports import adapter_ref

PIRATE = adapter_ref(1)


def prompt(*blocks: int, rest: int = 0, adapter: AdapterRef | None = None) -> Route:
    """Return blocks of equal tokens, and ``rest`` tokens of another block."""
    tokens = tuple(number for number in blocks for _ in range(BLOCK_TOKENS))
    return Route(
        request_id="r1",
        gateway="gateway-0",
        prompt_tokens=(*tokens, *range(rest)),
        sampling=SamplingParams(max_tokens=1),
        adapter=adapter,
    )


def test_full_blocks_of_a_prefix_are_found() -> None:
    memory = PrefixMemory()
    memory.record_sent("e0", prompt(1, 2, 3, rest=5))
    memory.record_sent("e1", prompt(1))
    assert memory.cached_tokens(prompt(1, 2, 9, rest=1)) == {"e0": 2 * BLOCK_TOKENS, "e1": BLOCK_TOKENS}
    assert memory.cached_tokens(prompt(2, 3)) == {}
    assert memory.cached_tokens(prompt(rest=5)) == {}


def test_at_least_one_token_needs_prefill() -> None:
    memory = PrefixMemory()
    memory.record_sent("e0", prompt(1))
    assert memory.cached_tokens(prompt(1)) == {"e0": BLOCK_TOKENS - 1}


def test_prefixes_of_another_adapter_do_not_match() -> None:
    memory = PrefixMemory()
    memory.record_sent("e0", prompt(1, adapter=PIRATE))
    assert memory.cached_tokens(prompt(1)) == {}
    assert memory.cached_tokens(prompt(1, adapter=adapter_ref(2))) == {}
    assert memory.cached_tokens(prompt(1, rest=9, adapter=PIRATE)) == {"e0": BLOCK_TOKENS}


def test_a_forgotten_engine_has_no_prefixes_until_it_is_sent_more() -> None:
    memory = PrefixMemory()
    for engine in ("e0", "e1"):
        memory.record_sent(engine, prompt(1, 2))
    memory.forget("e0")
    memory.forget("unknown")
    assert memory.cached_tokens(prompt(1, rest=1)) == {"e1": BLOCK_TOKENS}
    memory.record_sent("e0", prompt(1))
    assert memory.cached_tokens(prompt(1, 2, rest=1)) == {"e0": BLOCK_TOKENS, "e1": 2 * BLOCK_TOKENS}


def test_a_lookup_is_not_reused_after_a_change() -> None:
    memory, request = PrefixMemory(), prompt(1, rest=1)
    assert memory.cached_tokens(request) == {}
    memory.record_sent("e0", request)
    assert memory.cached_tokens(request) == {"e0": BLOCK_TOKENS}
    memory.forget("e0")
    assert memory.cached_tokens(request) == {}


def test_least_recently_sent_prefixes_are_forgotten_first_and_long_ones_before_short_ones() -> None:
    memory = PrefixMemory(max_prefixes=3)
    memory.record_sent("e0", prompt(1, 2))
    memory.record_sent("e0", prompt(7, 8))
    assert memory.cached_tokens(prompt(1, 2)) == {"e0": BLOCK_TOKENS}
    memory.record_sent("e0", prompt(1))
    memory.record_sent("e0", prompt(5))
    assert memory.cached_tokens(prompt(1, rest=1)) == {"e0": BLOCK_TOKENS}
    assert len(memory) == 3


def test_a_prefix_remembers_its_latest_engines_only() -> None:
    memory = PrefixMemory()
    for number in range(MAX_ENGINES + 2):
        memory.record_sent(f"e{number}", prompt(1))
    assert set(memory.cached_tokens(prompt(1, rest=1))) == {f"e{n}" for n in range(2, MAX_ENGINES + 2)}


def test_a_bounded_number_of_blocks_of_a_prompt_is_remembered() -> None:
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
def test_prefix_memory_agrees_with_a_plain_list(steps) -> None:
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
