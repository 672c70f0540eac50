"""Command-line tools: data, tokenizers, baselines."""
