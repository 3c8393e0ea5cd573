"""The durable adapter registry and the slabs: registration, versions, validation."""
