"""Where a row says that an image is, in the forms that are in use."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from llm.errors import UserError

ImageSource = str | bytes
"""A path, or the content of a file."""


def source_of(value: Any, where: str) -> ImageSource:
    """Where an image is, of one of the forms in use: a path, bytes, {bytes, path} or a data: address. UserError where
    it is none of them.
    """
    if isinstance(value, Mapping):
        known = [value[key] for key in ("bytes", "path", "url") if value.get(key) is not None]
        if not known or isinstance(known[0], Mapping):
            raise UserError(f"{where} has neither bytes nor path")
        return source_of(known[0], where)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is neither a path nor bytes")
    if not value.startswith("data:"):
        return value
    head, comma, content = value.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{where} is a data: address that cannot be read ({error})") from None
