"""The monitor: engine load, demand per adapter, who is alive. It never decides."""
