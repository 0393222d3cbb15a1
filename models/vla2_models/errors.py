"""What the networks raise for a checkpoint that cannot be used."""


class CheckpointError(Exception):
    """A checkpoint cannot be found, read or trusted: one line, with the value and the way out."""
