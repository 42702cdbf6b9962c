"""The backend that a program is traced for: the one in use, or the one that a plan compiles for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="")


def backend() -> str:
    """`cpu`, `gpu` or `tpu`: where the program being traced will run. Use it instead of `jax.default_backend()`."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def target_backend(platform: str) -> Iterator[None]:
    """Trace the body of the `with` block for another backend than the one in use."""
    token = _target.set({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform))
    try:
        yield
    finally:
        _target.reset(token)
