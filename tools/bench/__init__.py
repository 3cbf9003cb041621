"""covo-bench: measurements against the stock path and against what the machine can do."""
