"""covo-synth: a checkpoint with random weights in the published layout."""
