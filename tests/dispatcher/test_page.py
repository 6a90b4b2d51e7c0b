"""The monitor's page in a real Chromium: a swap, a refusal with its reason, a worker that dies and comes back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorayard.dispatcher.monitor.command import address, serve

from .conftest import HOLD, LiveYard
from .fake import KEYS
from .test_monitor import FIELDS

CHROMIUM = os.environ.get("LORAYARD_CHROMIUM") or shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium; LORAYARD_CHROMIUM names one"),
    pytest.mark.filterwarnings("default"),
]  # fmt: skip
SHOTS = Path(os.environ["LORAYARD_SHOTS"]) if "LORAYARD_SHOTS" in os.environ else None
"""Where screenshots go, if they are wanted: docs/monitor for those of the docs."""
UNNAMED = """() => [...document.querySelectorAll('button, select, input, a, [tabindex="0"]')].filter(node =>
  !(node.getAttribute('aria-label') || node.textContent.trim() ||
    document.getElementById(node.getAttribute('aria-labelledby'))))
  .map(node => node.outerHTML)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(empty_yard: LiveYard) -> Iterator[Any]:
    """(yard, address of its page)"""
    server, recorder = serve(empty_yard.server.url, "yard:", "127.0.0.1", 0, "")
    yield empty_yard, address(server)
    server.shutdown()
    recorder.stop()
    server.server_close()


def opened(browser: Any, url: str, faults: list[str], **options: Any) -> Any:
    """The page, in a context of its own; what it complains about goes into `faults`."""
    page = browser.new_context(**options).new_page()
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((url, "data:")) else faults.append(asked.url))
    page.goto(url)
    return page


def test_the_page_shows_what_happens(served: Any, browser: Any) -> None:
    yard, url = served
    worker = yard.work(slots=1)
    yard.serve()
    faults: list[str] = []
    page = opened(browser, url, faults)
    page.get_by_role("heading", name="gpu-h-0").wait_for()
    yard.final(yard.send(adapter="a"))
    page.locator(".slots li", has_text="a").wait_for()
    page.wait_for_timeout(1200)
    yard.final(yard.send(adapter="b"))
    page.locator("#log li", has_text="slot 0: a → b").wait_for()
    yard.final(yard.send(id="evil", adapter="nobody<img src=x onerror=fail()>"))
    row = page.locator("#dead tr", has_text="bad_adapter")
    row.wait_for()
    row.get_by_role("button").click()
    page.locator("#job", has_text="refused, bad_adapter").wait_for()
    page.keyboard.press("Escape")
    assert page.locator("#job").is_hidden()
    yard.halt(worker)
    yard.redis.hset(KEYS.gpu("gpu-h-0"), "beat_ms", 1)
    page.locator("#log .bad", has_text="gpu-h-0 ready → ").wait_for()
    page.locator(".gpu", has_text="ready").wait_for(state="detached")
    yard.redis.delete(KEYS.gpu("gpu-h-0"))
    yard.work(slots=1)
    page.locator("#log .good", has_text=" → ready").first.wait_for()
    page.locator(".gpu", has_text="ready").wait_for()
    assert "ready" in page.locator("#say").text_content()
    assert faults == [], faults


def test_every_control_has_a_name_and_the_keyboard_reaches_it(served: Any, browser: Any) -> None:
    yard, url = served
    yard.work()
    faults: list[str] = []
    page = opened(browser, url, faults, color_scheme="dark")
    page.get_by_role("heading", name="gpu-h-0").wait_for()
    assert page.evaluate(UNNAMED) == []
    for role in ("banner", "main", "search"):
        assert page.get_by_role(role).count() == 1, role
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"id", "theme", "sort"} <= reached
    page.keyboard.press("/")
    page.keyboard.type("nobody")
    page.keyboard.press("Enter")
    page.locator("#job", has_text="This id is not known").wait_for()
    page.get_by_role("button", name="Switch between dark and light").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert faults == [], faults


@pytest.mark.skipif(SHOTS is None, reason="LORAYARD_SHOTS names no folder")
def test_screenshots(served: Any, browser: Any) -> None:
    yard, url = served
    for at in range(3):
        yard.work(slots=3, seats=8, gpu=f"gpu-h-{at}")
    yard.serve()
    faults: list[str] = []
    page = opened(browser, url, faults, viewport={"width": 1280, "height": 1000}, color_scheme="light")
    for at in range(90):
        yard.send(("yard:in", "yard:in:batch", "yard:in:urgent")[at % 3], prompt=HOLD, adapter="abcdef"[at % 6])
    for name in ("nobody", "a*9*9"):
        yard.send(id=f"job-{len(name)}", adapter=name)
    for step in range(30):
        for at in range(3):
            rate = 900 + 280 * at + 60 * (step * (at + 3) % 7)
            figures = FIELDS | {"tokens_per_s": rate, "prompt_tokens_per_s": 3 * rate, "temperature_c": 55 + 4 * at}
            yard.redis.hset(KEYS.gpu(f"gpu-h-{at}"), mapping=figures | {"loading": "[2]" if at == 1 else "[]",
                            "wait_p50_ms": 210, "wait_p95_ms": 830, "wait_p99_ms": 1400})  # fmt: skip
        page.wait_for_timeout(1000)
    assert SHOTS
    page.screenshot(path=str(SHOTS / "light.png"), full_page=True)
    page.get_by_role("button", name="Switch between dark and light").click()
    page.screenshot(path=str(SHOTS / "dark.png"), full_page=True)
    phone = opened(browser, url, faults, viewport={"width": 390, "height": 844}, color_scheme="dark")
    phone.locator(".gpu").first.wait_for()
    phone.wait_for_timeout(500)
    phone.screenshot(path=str(SHOTS / "phone.png"))
    assert faults == [], faults
