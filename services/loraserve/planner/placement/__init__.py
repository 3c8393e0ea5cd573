"""Placement policies: which engine holds which adapter, computed from forecast demand. Pure: no I/O, no clock."""
