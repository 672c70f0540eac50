"""The one exception that means "the person who started this must mend something".

Launch scripts print it as a single line and exit; anything else is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Bad input: the message names the key or the file, and says what is possible instead.

    `agreed` means that every rank raises it together, so that one of them is enough to print it.
    """

    agreed = False


class DamagedFile(UserError):
    """A file whose content is not what was written.

    Automatic resume falls back to an older checkpoint; nothing else goes on.
    """


class NoTokenizer(UserError):
    """A model without a tokenizer beside it."""
