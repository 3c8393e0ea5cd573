"""The router: admission and the choice of an engine for every request."""
