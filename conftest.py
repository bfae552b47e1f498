"""For all tests and doctests: where the optional data lies, and how programs are compiled."""

import importlib.metadata
import os
import pathlib

import jax
import pytest
from hypothesis import HealthCheck, settings

ROOT = pathlib.Path(__file__).parent

# Compiling is nine tenths of a run, and takes two thirds of the time with the emitters that JAX
# 0.10 has beside its default ones. Other versions know no such flag. `XLA_FLAGS= pytest` does
# without.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption(
        "--data",
        default=os.environ.get("JAXCERT_DATA"),
        help="folder with the reference data (cohen_logs, ...); default: the variable JAXCERT_DATA",
    )


@pytest.fixture(scope="session")
def data(request):
    """The folder with the reference data; tests that ask for it are skipped without one."""
    folder = request.config.getoption("--data")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("needs the reference data: pass --data DIR or set JAXCERT_DATA")
    return pathlib.Path(folder)


@pytest.fixture(autouse=True)
def registered_rules():
    """A rule that a test or an example registers is gone after it."""
    from jaxcert.bounds.interpreter import RULES
    from jaxcert.bounds.planes import PLANES
    from jaxcert.rows import FOLLOW

    tables = [(table, dict(table)) for table in (RULES, FOLLOW, PLANES)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)
