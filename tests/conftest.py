"""Checkpoint folders that many tests share, written once per test run."""

import gc
import signal

# Importing the tests and what they need makes a million objects that stay: looking through them for
# garbage over and over is half of that time. Until pytest_collection_finish.
gc.disable()

import untraced  # noqa: E402

with untraced.part():  # coverage would follow every line of them, to count none
    import datasets  # noqa: E402, F401
    import hypothesis  # noqa: E402, F401
    import nbclient  # noqa: E402, F401
    import peft  # noqa: E402, F401
    import pytest  # noqa: E402
    import seaborn  # noqa: E402, F401
    import tiny  # noqa: E402
    import torch  # noqa: E402

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell starts what it puts in the background so, and every child would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small matrices are faster on one thread, and the sums come in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict:
    """{architecture: folder} of complete tiny checkpoints; not to be written to."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny.save(root / name, name) for name in tiny.ARCHITECTURES}


# files that run notebooks: a minute and more each. They come first, so that no process is left with
# one of them while the others are done
LONGEST = (
    *("running/test_notebooks.py", "study/test_real.py", "models/test_architectures.py"),
    *("comparison/test_experiment.py", "running/test_runs.py", "running/test_solutions.py"),
    *("models/test_families.py", "tuning/test_patch.py", "running/test_memory.py"),
)


def pytest_configure(config):
    """The mark of what needs a GPU (on_devices.py); benchmarks/gpu.sh runs these alone."""
    config.addinivalue_line("markers", "cuda: skipped where torch sees no GPU")
    if getattr(config.option, "numprocesses", None):  # this one only hands out the tests
        gc.enable()


def pytest_collection_finish():
    """From here on garbage is collected as usual, but what the imports made is not looked at."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """A file's own order stays."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))
