"""Every test starts from the same seed, with validation on and Pyro's store empty."""

import gc
import os
import shutil
import signal

# The tensors of the tests are small: one thread is faster, and two workers on two cores do not wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # inherited where the tests run in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Examples are the same on every run; torch's first calls are slow, which a deadline would mistake for a fault.
settings.register_profile(
    "fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _fixed_state():
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    yield
    assert not list(pyro.get_param_store().keys()), "the test left parameters in Pyro's global store"


@pytest.fixture(scope="module")
def undrawn():
    """Pictures are written empty, where a test looks at everything else that a run leaves; tests of plotting draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.draw", lambda self, renderer: None)
        yield


@pytest.fixture(scope="session")
def chromium():
    """A headless browser; where there is none its tests are skipped, or fail if PROBATTN_REQUIRE_BROWSER is set."""
    give_up = pytest.fail if os.environ.get("PROBATTN_REQUIRE_BROWSER") else pytest.skip
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        give_up("playwright drives the browser: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("PROBATTN_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        give_up("no Chromium on this machine: install one, or name it in PROBATTN_CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch finds none"))


def pytest_collection_finish():
    """Leave the libraries out of garbage collection: accelerate collects several times a run, each time all objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or nanobind reports every object that is alive at the end as leaked
