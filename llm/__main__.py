"""`python -m llm` is the command `lattice`."""

from llm.command.main import main

if __name__ == "__main__":
    main()
