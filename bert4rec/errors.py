"""The only exception class for errors in a user's input."""


class InputError(Exception):
    """The user's input is unusable. The message says what is wrong, where, how often, and what is expected."""
