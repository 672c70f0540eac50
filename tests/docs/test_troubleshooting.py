"""docs/troubleshooting.md: each message on it is one that is printed."""

import errno
import os
import re

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tests.docs.messages import printed
from tests.docs.pages import text_of

PAGE = "docs/troubleshooting.md"
KEYS = re.findall(r"^- \*\*`([^`]+)`\*\*\n  \S", text_of(PAGE), flags=re.M)
OF_OTHERS = {
    "torch.OutOfMemoryError": torch.OutOfMemoryError.__name__,
    "No space left on device": os.strerror(errno.ENOSPC),
    "ChildFailedError": ChildFailedError.__name__,
}
"""Messages that the system and torch write -> what they are there."""


@pytest.mark.parametrize("key", [key for key in KEYS if key not in OF_OTHERS])
def test_a_message_stands_in_the_sources(key: str) -> None:
    assert printed(key)


@pytest.mark.parametrize("key", OF_OTHERS)
def test_messages_of_others_are_called_so(key: str) -> None:
    assert key in KEYS and OF_OTHERS[key] == key.removeprefix("torch.")


def test_no_row_of_the_page_is_without_a_message() -> None:
    assert len(KEYS) == len(re.findall(r"^- ", text_of(PAGE), flags=re.M)) >= 50
    assert len(set(KEYS)) == len(KEYS)


def test_what_no_source_says_is_found() -> None:
    assert not printed("parallel.tensor=... does not please model.n_heads=...")
    assert not printed("...: ...")
