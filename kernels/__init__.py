"""Hardware side of the house: tensors in, tensors out; no model names, no files."""
