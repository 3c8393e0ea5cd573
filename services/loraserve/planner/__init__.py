"""The planner: decides where copies of adapters live, and rolls a new plan out."""
