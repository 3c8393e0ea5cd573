"""The counts of a chaos run: events, and faults that must not happen."""

from dataclasses import dataclass, field, fields

from harness.report import Number, table

MOST_NOTES = 8


@dataclass
class Counts:
    """Counts of events and faults. ``FAULTS`` names the faults."""

    requests: int = 0
    tokens: int = 0
    migrations: int = 0
    owners_killed: int = 0
    readers_killed: int = 0
    owners_stopped: int = 0
    readers_stopped: int = 0
    poisonings: int = 0
    mismatches_seen: int = 0
    leases_expired: int = 0
    read_over_shm: int = 0
    read_over_tcp: int = 0
    restarts: int = 0
    wrong_texts: int = 0
    stuck_requests: int = 0
    failed_requests: int = 0
    crashed_engines: int = 0
    leaked_memfds: int = 0
    leaked_shm_files: int = 0
    leaked_sockets: int = 0
    engine_leaks: int = 0
    notes: list[str] = field(default_factory=list)
    """Descriptions of the first faults."""

    def note(self, text: str) -> None:
        if len(self.notes) < MOST_NOTES:
            self.notes.append(text)

    def faults(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in FAULTS}

    def figures(self) -> dict[str, Number]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "notes"}

    def text(self) -> str:
        names = [name for name in self.figures() if name not in FAULTS]
        done = table("Events", ["", "count"], [[_words(name), getattr(self, name)] for name in names])
        bad = table("Faults", ["", "count", "goal"], [[_words(n), v, 0] for n, v in self.faults().items()])
        return "\n".join([done, bad, *(f"  {note}" for note in self.notes)])


FAULTS = (
    "wrong_texts",
    "stuck_requests",
    "failed_requests",
    "crashed_engines",
    "leaked_memfds",
    "leaked_shm_files",
    "leaked_sockets",
    "engine_leaks",
)


def _words(name: str) -> str:
    return name.replace("_", " ")
