"""A training step on DeepSpeed: the engine, its schedules, its state, and all that is private to DeepSpeed."""
