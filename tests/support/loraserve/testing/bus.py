"""A cluster's bus in one process, with faults. See MemoryNetwork."""

from loraserve.bus.memory import Fault, FaultRule, MemoryBus, MemoryNetwork

__all__ = ["Fault", "FaultRule", "MemoryBus", "MemoryNetwork"]
