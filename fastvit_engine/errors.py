"""The one exception a user is meant to see."""


class UserError(Exception):
    """Bad input: the message says in one sentence what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
