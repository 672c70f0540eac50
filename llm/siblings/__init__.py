"""The public names of other projects over one model: an adapter renames arguments and re-shapes results, and has no
layers of its own."""
