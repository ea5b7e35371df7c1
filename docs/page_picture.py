"""Takes the picture of the server's page, page.png beside this file: ``python docs/page_picture.py [ADDRESS]``.

Start ``mlx-diffgemma serve sudoku`` first; ADDRESS is its address, by default http://127.0.0.1:8000/. The script needs playwright
(``pip install playwright``) and a Chromium, the system's or playwright's own. The picture shows the fonts of this machine.
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

#: A puzzle that the Sudoku model solves with this seed, after it takes back accepted cells.
PUZZLE, SEED = ".5..3......4..3.1...2...12.....4..61", 1


def run(page: Page, address: str) -> None:
    """Let the model solve the puzzle, then show the first step that takes a cell back."""
    page.goto(address)
    page.wait_for_selector("#model:not(:empty)")
    page.click("summary")
    page.fill("#seed", str(SEED))
    page.click("summary")
    page.fill("#prompt", PUZZLE)
    page.click("#start")
    page.wait_for_selector("#result", state="visible")
    page.focus("#step")
    page.keyboard.press("Home")
    page.evaluate("new Promise(requestAnimationFrame)")
    while not page.locator("#cells .back").count():
        page.keyboard.press("ArrowRight")
        page.evaluate("new Promise(requestAnimationFrame)")
    page.evaluate("document.activeElement.blur()")


def main(address: str) -> None:
    with sync_playwright() as driver:
        # Chromium's sandbox does not work for root.
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), chromium_sandbox=os.geteuid() != 0)
        page = browser.new_page(viewport={"width": 1200, "height": 800}, reduced_motion="reduce", color_scheme="light")
        run(page, address)
        page.screenshot(path=Path(__file__).with_name("page.png"))
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/")
