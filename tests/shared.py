"""Where the optional data for tests lies, beside the project; a clone without it skips those tests."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = (ROOT.parent / "shared").resolve()

needs_shared = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason="the folder ../shared with real test data is not beside this clone"
)
