"""The one error of ours that a user can put right, and one of torch that they can."""


class DTEError(ValueError):
    """Something that the user can put right; the message is one sentence that says how.

    The command prints it without a traceback. Any other exception is a fault of the program.
    """

    def __init__(self, message: object = "") -> None:
        """message: becomes one line, whatever names and values of the user it cites."""
        super().__init__(" ".join(str(message).splitlines()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory or the machine's is used up: torch has several errors for that."""
    text = str(error).lower()
    told = any(words in text for words in ("out of memory", "can't allocate memory"))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and told)
