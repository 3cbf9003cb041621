"""The errors that a user sees: one clear message, no traceback. Anything else that escapes is a fault of ours."""

from collections.abc import Sequence


class CovoError(Exception):
    """Base of all errors that the command line prints as one message and ends with exit code 1."""


class BackendError(CovoError):
    """A device, a backend or one of its libraries is missing, broken or unknown."""


def listed(items: Sequence[str], shown: int = 10, separator: str = "; ") -> str:
    """Return the first `shown` items of a message, and how many more there are."""
    more = [f"... and {len(items) - shown} more"] if len(items) > shown else []
    return separator.join([*items[:shown], *more])


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
