"""What this gateway did with each request, and under which ids an operator may ask for a story."""

from collections import OrderedDict
from collections.abc import Sequence

from loraserve.messages import AdapterRef
from loraserve.story import Story

MAX_ANSWERS = 8192
SHORT_VERSION = 12
"""Logs and tables show this many characters of a version; an operator may ask with them."""


class RequestStories:
    """The stories of requests. Each choice of an answer is a request of its own to the router and an engine.

    An operator knows the id of the answer, or the ``x-request-id`` header of the HTTP request. Both stand for all
    choices.
    """

    def __init__(self) -> None:
        self.story = Story()
        self._choices: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def begin(self, http_id: str, answer_id: str, choices: Sequence[str], now: float) -> None:
        """Record the ids of an answer's choices. Called before the requests are sent to the router."""
        for known in (http_id, answer_id):
            self._choices[known] = tuple(choices)
            self._choices.move_to_end(known)
            if len(self._choices) > MAX_ANSWERS:
                self._choices.popitem(last=False)
        for choice in choices:
            self.story.tell(choice, now, f"received as HTTP request {http_id}")

    def subjects(self, id_: str, adapters: Sequence[AdapterRef]) -> tuple[str, ...]:
        """Return everything that ``id_`` may stand for: choices of an answer, an adapter's name, a version.

        Without a record of the answer, as in a gateway that was restarted, the first choice is assumed.
        """
        found = [id_, *self._choices.get(id_, (f"{id_}-0",))]
        for adapter in adapters:
            is_version = len(id_) >= SHORT_VERSION and adapter.version.startswith(id_)
            if adapter.name == id_ or is_version:
                found += [adapter.name, adapter.version]
        return tuple(dict.fromkeys(found))
