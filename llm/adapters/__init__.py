"""What stands beside or in place of weights that do not train: low-rank adapters, and weights of one byte a value."""
