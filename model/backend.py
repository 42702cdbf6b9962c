"""The backend that a program is for: the one here, or the one that a plan compiles for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="")


def backend() -> str:
    """`cpu`, `gpu` or `tpu`: what the program being traced will run on. Ask this, never `jax.default_backend()`."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def target_backend(platform: str) -> Iterator[None]:
    """Trace what is inside for another backend than the one here."""
    token = _target.set({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform))
    try:
        yield
    finally:
        _target.reset(token)
