"""Starts, watches, restarts and stops the processes of a cluster on one machine."""
