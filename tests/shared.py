"""Where the optional data for tests lies, beside the project; a clone without it skips those tests."""

from pathlib import Path

import pytest

SHARED = (Path(__file__).resolve().parents[2] / "shared").resolve()

needs_shared = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason="the folder ../shared with real test data is not beside this clone"
)
