"""Code blocks run as a reader would run them: one after the other, names kept, what they print held against what the
comments beside it say."""

import contextlib
import io
import re
from collections.abc import Mapping
from typing import Any

PRINTED = re.compile(r"^print\(.*\)\s+# \[(?P<shape>[\d, ]+)\]$")
"""A line that prints a shape, and the shape as the comment beside it says."""


def run(code: str, names: dict[str, Any], imports: Mapping[str, object] | None = None) -> str:
    """Run a block in `names`, and give what it prints. imports: what stands in the place of its import lines; None =
    they hold."""
    if imports is not None:
        code = without_imports(code, imports)
        names.update(imports)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "a code block of the document", "exec"), names)
    expected = [match["shape"] for line in code.splitlines() if (match := PRINTED.match(line))]
    found = re.findall(r"torch\.Size\(\[([\d, ]+)\]\)", printed.getvalue())
    assert found == expected, f"printed {found}, the comments say {expected}"
    return printed.getvalue()


def without_imports(code: str, imports: Mapping[str, object]) -> str:
    """A block without its import lines, each name of which is among those that take their place."""
    joined = re.sub(r"^(from [\w.]+ import )\(([^)]*)\)", lambda m: m[1] + " ".join(m[2].split()), code, flags=re.M)
    kept = []
    for line in joined.splitlines():
        match = re.match(r"(?:from [\w.]+ )?import (.*)", line)
        if match is None:
            kept.append(line)
            continue
        for name in filter(None, (part.strip() for part in match[1].split(","))):
            assert name in imports, f"{line!r} imports {name}, which has no place here"
    return "\n".join(kept)
