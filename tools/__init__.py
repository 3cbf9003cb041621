"""What people use around the runtime: benches, checks, synthetic checkpoints."""
