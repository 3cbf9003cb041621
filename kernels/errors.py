"""The errors that a user sees: one clear message, no traceback. Anything else that escapes is a fault of ours."""


class CovoError(Exception):
    """Base of all errors that the command line prints as one message and ends with exit code 1."""


class BackendError(CovoError):
    """A device, a backend or one of its libraries is missing, broken or unknown."""
