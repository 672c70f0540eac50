"""Entry points: parse, build, run. Nothing imports this package."""
