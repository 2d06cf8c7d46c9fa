"""How a tool ends that was started as a command."""

import sys
from collections.abc import Callable

from dte_lab.common.errors import DTEError, sentence_of


def run_command(main: Callable[[], int | None]) -> None:
    """End the process with main's status; what was wrong is one sentence, and no traceback."""
    try:
        sys.exit(main())
    except (DTEError, OSError) as error:
        sys.exit(sentence_of(error))
