"""Whether this Python is new enough and has the packages that everything here imports; looked at once, before they are.

Kept to what a Python of years ago can read: it is the first file of the project that runs.
"""

import importlib.util
import os
import sys

OLDEST = (3, 11)
LLM = os.path.dirname(os.path.abspath(__file__))
SHIPPED = os.path.join(LLM, "_shipped")
"""Of a wheel: what a checkout has beside llm/ (llm/shipped.py)."""
PACKAGES = ("torch", "numpy", "PIL", "pydantic", "yaml", "tqdm", "safetensors", "sentencepiece", "pyarrow")


def problem() -> "str | None":
    """One line for what is missing and what to do; None where nothing is."""
    python = f"{sys.executable or 'this'} is Python {sys.version_info[0]}.{sys.version_info[1]}"
    remedy = "`make setup` makes .venv with all of it: use .venv/bin/python"
    if os.path.isdir(SHIPPED):
        remedy = "`pip install` its wheel without --no-deps, which brings them"
    if sys.version_info[:2] < OLDEST:
        return f"{python}; Lattice needs {OLDEST[0]}.{OLDEST[1]} or later; {remedy}"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"{python} without {', '.join(missing)}, which Lattice needs; {remedy}"
    return None


def check() -> None:
    """ImportError with that line; a command of this project (launch/, tools/, lattice) prints it and ends with status
    2.
    """
    line = problem()
    if line is None:
        return
    if _is_command():
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)
    raise ImportError(line)


def _is_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # what Python has there while it looks for the module: `python -m llm`
        return True
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:  # a prompt, or `python -c`
        return False
    folder, name = os.path.split(os.path.abspath(file))
    scripts = [os.path.join(root, part) for root in (os.path.dirname(LLM), SHIPPED) for part in ("launch", "tools")]
    return folder in scripts or os.path.splitext(name)[0] == "lattice"


check()
