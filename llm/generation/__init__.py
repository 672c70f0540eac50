"""From prompts to texts: choice of tokens, streaming, files of prompts, a terminal. llm/generate.py has the loop."""
