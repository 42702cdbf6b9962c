"""Eight host devices, a compilation cache, and one tiny base for all tests."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

import pytest  # noqa: E402
from tiny import Base, make_base  # noqa: E402


@pytest.fixture(scope="session")
def base() -> Base:
    """The tiny base, its layers stacked."""
    return make_base()
