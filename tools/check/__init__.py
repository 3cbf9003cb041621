"""covo-check: proofs on this machine that the numbers are right."""
