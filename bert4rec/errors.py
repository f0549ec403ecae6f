"""The only exception class for errors in a user's input."""


class InputError(Exception):
    """The user's input is unusable. The message says what is wrong, where, how often, and what is expected."""


def shown(text: str, limit: int = 100) -> str:
    """Text of a file for a message: at most `limit` characters, and nothing that moves a terminal."""
    text = text if len(text) <= limit else f"{text[:limit]} …"
    return text if text.isprintable() else repr(text)[1:-1]
