"""Pfeiffer's adapters: Houlsby's, behind the MLP only (arXiv:2005.00247)."""

from .houlsby import Houlsby


class Pfeiffer(Houlsby):
    """y + gelu(y W_down + b_down) W_up + b_up behind the MLP alone, W_up = 0 at init (arXiv:2005.00247)."""

    demo = False

    where: str = "layers/mlp/down"
