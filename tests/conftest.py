"""Eight host devices, compilation that is quick rather than good, a cache of it, and one tiny base for all tests."""

import gc
import os
import re
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


# The fast tier (make test) holds every law for one method of each mechanism, and one law (4, fold) for all of them.
FAST_METHODS = {
    "subset", "layer_range", "lora", "dora", "lora_range", "norms_and_lora", "ia3", "houlsby", "prompt", "prefix",
    "oft", "vera", "adalora", "pissa", "tokens",
}  # fmt: skip
FOR_ALL_METHODS = ("test_4_",)


@pytest.hookimpl(tryfirst=True)  # before xdist, which makes names of the groups here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is not in the fast tier. Give all laws of one method to one worker, which has its programs."""
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params
        law = params and item.path.name == "test_laws.py" and item.name.startswith(FOR_ALL_METHODS)
        if params and "method" in params and not law and not FAST_METHODS & set(re.split("[-]", item.callspec.id)):
            item.add_marker(pytest.mark.full)
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
