"""A request's states: the documented diagram is the transition table, and only its transitions are possible."""

import re
from itertools import product

import pytest

from loraserve.engine.schedule import sequence as module
from loraserve.engine.schedule.sequence import TRANSITIONS, Sequence, SequenceState, Transition
from loraserve.messages import Admit, SamplingParams

ARROW = re.compile(r"^ +(\w+) --(\w+)--> (\w+)\b", re.MULTILINE)


def make_sequence() -> Sequence:
    admit = Admit(request_id="r", gateway="g", prompt_tokens=(1, 2), sampling=SamplingParams(max_tokens=4))
    return Sequence(admit, 1, 16, 4)


def test_the_diagram_shows_the_transition_table() -> None:
    arrows = ARROW.findall(module.__doc__ or "")
    diagram = {(SequenceState[s], Transition[t]): SequenceState[successor] for s, t, successor in arrows}
    assert len(arrows) == len(diagram), "an arrow is drawn twice"
    assert diagram == TRANSITIONS


@pytest.mark.parametrize(("state", "transition"), list(product(SequenceState, Transition)))
def test_only_the_transitions_of_the_table_are_possible(state: SequenceState, transition: Transition) -> None:
    sequence = make_sequence()
    sequence.state = state
    if (state, transition) in TRANSITIONS:
        sequence.advance(transition)
        assert sequence.state is TRANSITIONS[state, transition]
    else:
        with pytest.raises(AssertionError, match=f"r: {transition.name} in state {state.name}"):
            sequence.advance(transition)


def test_every_state_but_the_first_is_reached_and_every_state_but_the_last_is_left() -> None:
    assert set(TRANSITIONS.values()) == set(SequenceState)
    assert {state for state, _ in TRANSITIONS} == set(SequenceState) - {SequenceState.FINISHED}


def test_a_waiting_request_has_started_once_it_has_output() -> None:
    sequence = make_sequence()
    assert not sequence.has_started
    sequence.advance(Transition.START_EARLY)
    assert sequence.has_started
    sequence.advance(Transition.SET_BACK)
    assert not sequence.has_started
    sequence.history.append(3)
    assert sequence.has_started
    sequence.advance(Transition.RELEASE)
    assert not sequence.has_started


def test_output_of_an_earlier_attempt_does_not_count_as_started() -> None:
    admit = Admit(
        request_id="r", gateway="g", prompt_tokens=(1, 2, 3), generated=1, sampling=SamplingParams(max_tokens=4)
    )
    sequence = Sequence(admit, 1, 16, 4)
    assert sequence.output_length == 1
    assert not sequence.has_started
    sequence.history.append(4)
    assert sequence.has_started
