"""LN tuning: the norms alone (arXiv:2312.11420)."""

from .subset import Subset


class LNTuning(Subset):
    """Subset of the norms' scales and biases (arXiv:2312.11420)."""

    rate = 30.0
    demo = False

    where: str = "norms"
