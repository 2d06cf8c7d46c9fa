"""The one error of ours that a user can put right, and one of torch that they can."""

import re

LONGEST_WORD, LONGEST_LINE = 200, 800  # letters of a message; what is longer lacks its middle
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # or turn the text around


class DTEError(ValueError):
    """Something that the user can put right; the message is one sentence that says how.

    The command prints it without a traceback. Any other exception is a fault of the program.
    """

    def __init__(self, message: object = "") -> None:
        """message: becomes one line, whatever names and values of the user it cites."""
        super().__init__(one_line(message))


def one_line(message: object) -> str:
    """A message on one line that a terminal can show: long names and values without their middle.

    Both ends of the message stay, which say what is wrong and what to do.
    """
    text = " ".join(str(message).split())
    text = CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    words = (_without_middle(word, LONGEST_WORD) for word in text.split(" "))
    return _without_middle(" ".join(words), LONGEST_LINE)


def sentence_of(error: DTEError | OSError) -> str:
    """What to tell the user; of an OSError the file that it names, and why."""
    known = getattr(error, "strerror", None) and getattr(error, "filename", None)
    return one_line(f"{error.filename}: {error.strerror}." if known else error)


def reason_of(error: BaseException) -> str:
    """What an exception of a library says, to be put into a sentence."""
    said = getattr(error, "strerror", None) or error
    return _without_middle(one_line(said), LONGEST_WORD).rstrip(".") or type(error).__name__


def _without_middle(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    kept = longest // 2 - 2
    return f"{text[:kept]}...{text[-kept:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory or the machine's is used up: torch has several errors for that."""
    text = str(error).lower()
    told = any(words in text for words in ("out of memory", "can't allocate memory"))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and told)
