"""The one error that a user's input causes."""


class InputError(Exception):
    """The user's input cannot be used: one message of what, where, how many, and what is expected."""
