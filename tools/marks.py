"""Texts with parts that commands write, each between two lines that say which command."""


def between(text: str, mark: str, inside: str) -> str | None:
    """The text with `inside` between its two lines `mark`; None where there are not two."""
    parts = text.split(mark)
    return f"{parts[0]}{mark}\n{inside}\n{mark}{parts[2]}" if len(parts) == 3 else None
