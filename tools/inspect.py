"""What a path is: `python tools/inspect.py runs/a` lists a run's checkpoints, what is wrong with which, and which one
a resume would take; `python tools/inspect.py runs/a/checkpoints/step_00000100` lists all about one. `--verify` reads
every block. `python tools/inspect.py runs/cache/NAME --show 3 --images DIR` shows samples of data.cache_dir, and writes
the tiles of their images. Exit status 0: whole; 1: damaged; 2: bad input. The work is done in tools/inspection.py.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "inspect":
    # A script of this folder has the folder on its path, where `import inspect` finds this file instead of the
    # standard library's. So it takes the folder off the path, and the right one's place.
    sys.path[:] = [str(HERE.parent) if Path(entry or ".").resolve() == HERE else entry for entry in sys.path]
    del sys.modules[__name__]
    __import__(__name__)
else:
    if not __package__:
        sys.path[0] = str(HERE.parent)

    from llm.cli import run_cli
    from tools.inspection import inspect

    if __name__ == "__main__":
        run_cli(inspect)
