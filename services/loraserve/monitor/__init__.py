"""The monitor: engine load, demand per adapter, and which engines are alive. It decides nothing."""
