"""Checkpoints of other systems, in and out: tables of names and shapes, and what reads and writes files by them."""
