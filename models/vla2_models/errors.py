"""What the networks raise for a checkpoint that cannot be used, and how it is put on one line."""


class CheckpointError(Exception):
    """A checkpoint cannot be found, read or trusted: one line, with the value and the way out."""


def one_line(error: object) -> str:
    """Put a message that may have line breaks on one line."""
    return " ".join(str(error).split())


def describe(error: Exception) -> str:
    """Say what went wrong in a library, with its kind, on one line."""
    return one_line(f"{type(error).__name__}: {error}")
