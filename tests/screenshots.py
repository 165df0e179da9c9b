"""Takes the pictures of the playground that the docs show, from a real server with the demo store.

`python -m tests.screenshots` writes docs/playground*.png. Needs Chromium, and looks best with the Inter font installed.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page

from tests.browsers import run_chromium
from tests.e2e.server_process import ADMIN_KEY, ServerProcess

ROOT = Path(__file__).parents[1]
MIB = 1024 * 1024
MAX_PICTURE_BYTES = 200_000
WAIT_MILLISECONDS = 120_000
DESK = {"viewport": {"width": 1180, "height": 660}}
TALL_DESK = {"viewport": {"width": 1180, "height": 920}}
PHONE = {"viewport": {"width": 360, "height": 720}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}

QUESTION = "What is diabetes?"
MAX_TOKENS = 80


def main() -> None:
    """One picture after the other, each in a browser profile of its own."""
    with tempfile.TemporaryDirectory() as folder, run_chromium() as browser:
        store, log = Path(folder) / "store", Path(folder) / "log"
        shutil.copytree(ROOT / "demo" / "store", store)
        settings = {"store__device_budget_bytes": 64 * MIB, "engine__dtype": "bfloat16"}  # a budget that can be seen
        with ServerProcess(store, log, **settings) as server:
            take(browser, server, "playground", chat, **DESK)
            take(browser, server, "playground_compare", compare, **TALL_DESK, color_scheme="dark")
            take(browser, server, "playground_store", administration, **DESK)
            take(browser, server, "playground_phone", phone, **PHONE, color_scheme="dark")


def take(browser: Browser, server: ServerProcess, name: str, act: Callable[[Page], None], **profile: Any) -> None:
    """Opens the page, lets `act` use it, and writes the picture."""
    context = browser.new_context(**profile)
    context.set_default_timeout(WAIT_MILLISECONDS)
    page = context.new_page()
    page.add_init_script(f"sessionStorage.setItem('brainstacks.admin-key', '{ADMIN_KEY}')")
    page.goto(server.url)
    act(page)
    page.wait_for_timeout(1500)  # until the tiers have been looked at again
    path = ROOT / "docs" / f"{name}.png"
    page.screenshot(path=path)
    context.close()
    num_bytes = path.stat().st_size
    assert num_bytes < MAX_PICTURE_BYTES, f"{path} has {num_bytes} bytes"
    print(f"{path.relative_to(ROOT)}: {num_bytes} bytes")


def chat(page: Page) -> None:
    """The first question that the server is asked, so that its domains are cold."""
    ask(page, QUESTION)
    page.locator(".report").wait_for()


def compare(page: Page) -> None:
    """The router's mix beside one that was set by hand."""
    page.get_by_role("link", name="Compare").click()
    side = page.locator("#side-b")
    side.get_by_role("radio", name="Custom").check()
    side.get_by_role("slider", name="medical").fill("0.5")
    side.get_by_role("slider", name="chat").fill("0.5")
    ask(page, QUESTION)
    page.locator(".report").nth(1).wait_for()


def administration(page: Page) -> None:
    """Tiers and domains, one of them pinned."""
    page.get_by_role("link", name="Store", exact=True).first.click()
    page.get_by_role("button", name="Pin math").click()
    page.get_by_role("button", name="Unpin math").wait_for()


def phone(page: Page) -> None:
    """A question on a small screen."""
    ask(page, QUESTION)
    page.locator(".report").wait_for()


def ask(page: Page, question: str) -> None:
    """Without chance, so that the pictures are the same each time."""
    page.locator("#temperature").evaluate("(e) => { e.value = 0; e.dispatchEvent(new Event('input')); }")
    page.locator("#max-tokens").evaluate(f"(e) => {{ e.value = {MAX_TOKENS}; e.dispatchEvent(new Event('input')); }}")
    page.get_by_label("Your question").fill(question)
    page.get_by_label("Your question").press("Enter")


if __name__ == "__main__":
    main()
