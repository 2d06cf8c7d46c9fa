"""The one error of ours that a user can put right."""


class DTEError(ValueError):
    """Something that the user can put right; the message is one sentence that says how.

    The command prints it without a traceback. Any other exception is a fault of the program.
    """
