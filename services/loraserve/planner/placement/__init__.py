"""Placement policies assign copies of adapters to engines, based on forecast demand. They use no I/O and no clock."""
