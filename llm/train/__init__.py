"""The run: its config, the training loop and what watches over it."""
