"""The explorer in headless Chromium: no request may leave the machine, and no error may be printed."""

import time

import pytest

from probattn.teach.explorer import explorer_page

LOCAL = ("file://", "http://127.0.0.1", "data:")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    path.write_text(explorer_page(), encoding="utf-8")
    return path


@pytest.fixture
def open_page(chromium, saved):
    """Opens the page, from a file unless another address is given; checks at the end that nothing went wrong."""
    contexts, requests, errors = [], [], []

    def guard(route):
        url = route.request.url
        requests.append(url)
        if url.startswith(LOCAL):
            route.continue_()
        else:
            route.abort()

    def opened(fragment="", address=None, **options):
        options = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | options
        context = chromium.new_context(**options)
        contexts.append(context)
        context.route("**/*", guard)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((address or saved.as_uri()) + fragment)
        settle(page)
        return page

    opened.requests, opened.errors = requests, errors
    yield opened
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(LOCAL)] == []
    assert errors == []


def until(page, expression, seconds=20):
    """Ask until it is true; the page's policy forbids the evaluation of text that Playwright's own waiting needs."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} did not come true"
        page.wait_for_timeout(20)


def settle(page):
    """Wait until everything is drawn in full."""
    until(page, "probattn.idle")


@pytest.fixture(name="until")
def _until():
    return until


@pytest.fixture(name="settle")
def _settle():
    return settle
