"""A headless Chromium that the system has, for tests and pictures of the playground. Knows no page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """Where it is installed, if it is."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def run_chromium() -> Iterator[Browser]:
    """Without a sandbox, since containers rarely allow one, and for pages that the tests serve themselves."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
