"""BitFit: the biases alone (arXiv:2106.10199)."""

from .subset import Subset


class BitFit(Subset):
    """Subset of the biases that the base has (arXiv:2106.10199)."""

    rate = 10.0
    demo = False

    where: str = "biases"
