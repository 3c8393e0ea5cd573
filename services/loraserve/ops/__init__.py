"""Commands for operators: they ask a running gateway over HTTP and print its answers for people or as JSON."""
