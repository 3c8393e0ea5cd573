"""The HTTP API: routes, request bodies, and one handler module per group of endpoints."""
