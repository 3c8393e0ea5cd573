"""Events of each request in this gateway, and the ids under which an operator can look them up."""

from collections import OrderedDict
from collections.abc import Sequence

from loraserve.messages import AdapterRef
from loraserve.story import Story

MAX_ANSWERS = 8192
SHORT_VERSION = 12
"""Length to which logs and tables shorten versions. An operator can look up a shortened version."""


class RequestStories:
    """Records the events of requests. Each choice of an answer is a separate request to the router and an engine.

    An operator looks up the answer's id or the HTTP request's ``x-request-id``. Both map to the ids of all choices.
    """

    def __init__(self) -> None:
        self.story = Story()
        self._requests: OrderedDict[str, list[str]] = OrderedDict()
        """The ids of all requests of an answer. Both ids of the answer map to the same list."""

    def begin(self, http_id: str, answer_id: str, choices: Sequence[str], now: float) -> None:
        """Record the ids of an answer's choices. Call this before sending the requests to the router."""
        requests = list(choices)
        for known in (http_id, answer_id):
            self._requests[known] = requests
            self._requests.move_to_end(known)
            if len(self._requests) > MAX_ANSWERS:
                self._requests.popitem(last=False)
        for choice in choices:
            self.story.tell(choice, now, f"received as HTTP request {http_id}")

    def add_attempt(self, choice: str, attempt: str) -> None:
        """Record the id of a choice's next attempt. Does nothing if the answer is not kept any more."""
        answer_id = choice.rpartition("-")[0]
        self._requests.get(answer_id, []).append(attempt)

    def subjects(self, id_: str, adapters: Sequence[AdapterRef]) -> tuple[str, ...]:
        """Return all ids under which events of ``id_`` may be recorded: choices, adapter names and versions.

        If the answer is unknown, for instance after a restart, include the id of its first choice.
        """
        found = [id_, *self._requests.get(id_, (f"{id_}-0",))]
        for adapter in adapters:
            is_version = len(id_) >= SHORT_VERSION and adapter.version.startswith(id_)
            if adapter.name == id_ or is_version:
                found += [adapter.name, adapter.version]
        return tuple(dict.fromkeys(found))
