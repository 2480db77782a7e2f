"""The Space as people meet it: its process, and a real browser in front of it.

    python tests/space_page.py amvl-demo model_cards/space/screenshot.png

makes the picture that the README shows, from a checkpoint that the embedded default has trained. Needs Debian's `chromium` and
`chromium-driver`, or their like, on the path.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from fresh_process import NO_REPOSITORY
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait


APP = Path(__file__).resolve().parents[1] / "model_cards" / "space" / "app.py"
BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
PHONE = (390, 844)  # pixels
DONE = "Done in"


def find_browser():
    """Paths of a Chromium and its driver, or `None`."""
    found = [next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS)]
    return found if all(found) else None


@contextmanager
def running_app(folder, environment, app=APP):
    """
    Runs app.py in a process that cannot import this repository.

    Args:
        folder (`Path`): where it runs, and writes its log.
        environment (`dict[str, str]`): with `MODEL`, if app.py does not name one.
        app (`Path`): the file.

    Yields:
        `tuple[str, Path]`: its address and its log.
    """
    log = folder / "app.log"
    code = f"{NO_REPOSITORY}\nimport runpy\nrunpy.run_path({str(app)!r}, run_name='__main__')"
    environment = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    environment |= {"GRADIO_TEMP_DIR": str(folder / "gradio"), "HF_MODULES_CACHE": str(folder / "modules")}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield address[0], log
    finally:
        process.terminate()
        process.wait()


@contextmanager
def open_browser(folder):
    """A headless Chromium, driven by Selenium."""
    browser, driver = find_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars", f"user-data-dir={folder}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


class Page:
    """What a person can do on the page, and see."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address

    def open(self, size=(1280, 860), theme="light"):
        self.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE},
        )
        self.browser.get(f"{self.address}/?__theme={theme}")
        self.wait(lambda: self.browser.find_elements(By.CSS_SELECTOR, "#status [role=status] p"))
        return self

    def wait(self, condition):
        return WebDriverWait(self.browser, 60, 0.05).until(lambda _: condition())

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).text.strip()

    def press(self, *keys):
        """Keys, to whatever has the focus."""
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)

    def type(self, selector, text):
        field = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)
        field.send_keys(Keys.TAB)  # fields of numbers are read when they are left

    def upload(self, name, path):
        """Puts a file into `photo` or `other`, in the place of what is there."""
        self.remove(name)
        self.find(f"#{name} input[type=file]").send_keys(str(path))
        self.wait(lambda: self.browser.find_elements(By.CSS_SELECTOR, f"#{name} .image-frame img"))

    def remove(self, name):
        for button in self.browser.find_elements(By.CSS_SELECTOR, f"#{name} button[aria-label='Remove Image']"):
            button.click()
        self.wait(lambda: not self.browser.find_elements(By.CSS_SELECTOR, f"#{name} .image-frame img"))

    def ask(self, press=None):
        """Asks, by the button or as told, and returns the last message: that it is done, or what is wrong."""
        # What an earlier question has left would be taken for an answer.
        self.browser.execute_script("document.querySelector('#status [role=status]').innerHTML = '<p></p>'")
        (press or self.find("#ask").click)()
        self.wait(
            lambda: DONE in self.text("#status") or self.browser.find_elements(By.CSS_SELECTOR, "#status .error")
        )
        return self.text("#status")

    def answers(self):
        """The three answers by name."""
        return {name: self.text(f"#answer-{name} .said") for name in ("on", "shuffled", "off")}

    def spread(self):
        """How often each answer was given, by its text."""
        rows = self.browser.find_elements(By.CSS_SELECTOR, "#spread li")
        return {
            row.find_element(By.CLASS_NAME, "text").text: int(row.find_element(By.CLASS_NAME, "share").text.split()[0])
            for row in rows
        }


def main(checkpoint, picture):
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MODEL": str(Path(checkpoint).resolve())}
        with running_app(Path(folder), environment) as (address, _), open_browser(f"{folder}/browser") as browser:
            page = Page(browser, address).open()
            page.type("#temperature input[type=number]", "2")
            print(page.ask())
            page.wait(lambda: browser.execute_script("return document.querySelector('#map img').complete"))
            time.sleep(1)  # the page's own transitions
            browser.save_screenshot(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
