"""Checkpoints: the native fragment format, its folder of steps, and reading a model back from it."""
