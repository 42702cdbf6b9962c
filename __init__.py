"""graftax: pretrain a base, graft onto it. One train step over (frozen, trainable) pytrees."""

__version__ = "0.1.0"


class InputError(ValueError):
    """A mistake in what the user gave: what, where, what was wanted, what to do. One line, and exit code 2."""
