"""Eight host devices, compilation that is quick rather than good, a cache of it, and one tiny base for all tests."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Nearly all of the tests' time is XLA's compilation, which these make five times as fast. XLA stops at a flag that it
# does not know, and these two are not for ever.
flags = "--xla_force_host_platform_device_count=8 "
if version("jaxlib").startswith("0.10."):
    flags += "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
os.environ["XLA_FLAGS"] = flags + os.environ.get("XLA_FLAGS", "")  # of two that differ, the last one counts
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".cache")  # tokens; the user's own cache is no test's

import jax  # noqa: E402

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

import pytest  # noqa: E402
from tiny import Base, make_base  # noqa: E402


@pytest.fixture(scope="session")
def base() -> Base:
    """The tiny base, its layers stacked."""
    return make_base()


@pytest.hookimpl(tryfirst=True)  # before xdist, which makes names of the groups here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers (make test): all laws of one method to the same, which has its programs; else file by file."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            method = getattr(item, "callspec", None) and item.callspec.params.get("method")
            item.add_marker(pytest.mark.xdist_group(item.callspec.id if method else item.path.name))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """A compiled program takes some 30 memory maps, of which Linux gives a process 65,530; without one XLA crashes."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
