"""Test session set-up: eight host devices, the CPU backend, shape checks on in tests only."""

import gc
import os
from importlib import metadata
from pathlib import Path

import pytest

LARGE_WORKER = 3 * 2**30  # bytes

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time is the compiler's, and much of it spent on a program that another test, process
# or run has compiled: resumed runs, golden cases that are run twice.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
# Eight devices for the mesh tests; single-device tests simply use the first.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        metavar="DIR",
        help="run the golden cases found below DIR, not the committed ones",
    )


def pytest_configure(config):
    """Older code generation in XLA, which takes 0.6 of the compiler's time, in one piece.

    By default a program is cut into 32 pieces for as many threads to compile, which is a seventh
    more work, and the workers have no cores to spare. Not for `--golden`, which checks what users
    run. XLA stops at a flag that it does not know, so that only the release these were tried with
    is given them.
    """
    if not config.getoption("--golden") and metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += (
            " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        )


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items):
    """A file's tests on one worker, where they share runs and compiled programs.

    Golden cases go anywhere. Files are handed out first, those with the most tests before the
    others, then the cases, which fill what is left evenly.
    """
    for item in items:
        if item.path.name != "test_golden.py":
            item.add_marker(pytest.mark.xdist_group(item.location[0]))


def pytest_collection_finish(session):
    """Fewer collections of garbage, none of which looks at the modules and the tests again.

    Tracing makes millions of objects that stay: a tenth of its time went into looking at them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 20)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drops compiled programs after a module once a worker has grown large.

    JAX keeps every program: without this a worker ends above 6 GB.
    """
    yield
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return
    if pages * os.sysconf("SC_PAGE_SIZE") > LARGE_WORKER:
        import jax

        jax.clear_caches()
        gc.collect()


# Folders whose programs run a few steps each: nearly all of their time is the compiler's.
QUICK = (
    "driving",
    "graphs",
    "language",
    "restoration",
    "retrieval",
    "search",
    "security",
    "train",
    "video",
    "vision",
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Skips most optimizations where compiling is what takes the time.

    The committed golden cases too, not those of `--golden`, which check what users run. Processes
    that a test starts read the variable.
    """
    import jax

    where = request.path.relative_to(Path(__file__).parent).parts
    golden = where == ("test_golden.py",) and not request.config.getoption("--golden")
    quick = where[0] in QUICK or golden
    jax.config.update("jax_disable_most_optimizations", quick)
    with pytest.MonkeyPatch.context() as patch:
        if quick:
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", False)
