"""Parts of an engine for tests that are about something else."""
