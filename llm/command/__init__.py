"""One command: `lattice train`, `lattice chat` and so on, over the scripts of launch/ and tools/ as they are.

`table.py` lists the subcommands, `main.py` runs one. What `--help` and shell completion say is read from the sources
(`source.py`) without importing them, as importing torch takes seconds.
"""
