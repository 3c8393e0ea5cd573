"""The planner: where copies of adapters live, and the roll-out of a new plan."""
