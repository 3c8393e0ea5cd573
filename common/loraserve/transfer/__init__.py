"""One-sided reads of memory that another process owns: one protocol, a file for each transport."""
