"""`scclip-fast app` in a headless browser: the steps of a user, and no request to other machines.

With the environment variable SCCLIP_FAST_SCREENSHOT=FILE.png a test also saves a screenshot.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from scclip_fast.clip import SCCLIPConfig, create_model
from scclip_fast.plots import segmentation
from scclip_fast.scenes.draw import scene
from scclip_fast.segment import Segmenter

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
WAIT = 60  # seconds, for a busy machine; an idle one is ready long before

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)

# Python imports `sitecustomize` when it starts. This one notes each address that is connected to.
NOTING = """
import os, socket
connect, lookup = socket.socket.connect, socket.getaddrinfo
def note(where):
    with open(os.environ["NOTES"], "a") as file:
        print(where, file=file)
def noted_connect(self, address):
    note(address[0])
    return connect(self, address)
def noted_lookup(host, *args, **kwargs):
    note(host)
    return lookup(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = noted_connect, noted_lookup
"""


def wait(condition):
    """Waits until the condition is true; returns its value."""
    end = time.monotonic() + WAIT
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Runs the command; yields the address of the page and the file that lists its connections."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "sitecustomize.py").write_text(NOTING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from scclip_fast import cli; sys.exit(cli.main())"
    options = ["--device", "cpu", "--port", str(port), "--max-upload", "1"]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "NOTES": str(folder / "notes"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(folder),
    }
    command = [sys.executable, "-c", code, "app", *options]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/  (Ctrl+C ends it)\n"
        yield f"http://127.0.0.1:{port}/", folder / "notes"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # The sandbox does not start for root.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(DRIVER)) as driver:
        yield driver


@pytest.fixture
def page(browser, server):
    """Loads the page, and waits for the result of the example."""
    browser.get(server[0])
    wait(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#variants img")) == 14)
    return browser


def text(page):
    """Returns the sentence on the outliers and all captions."""
    script = (
        "return ['#outliers', '#variants'].map(x => document.querySelector(x)?.innerText).join()"
    )
    return page.execute_script(script)


def picture(page, selector):
    """Returns the RGB pixels of the first picture that the selector finds."""
    source = page.find_element(By.CSS_SELECTOR, f"{selector} img").get_attribute("src")
    with urllib.request.urlopen(source) as file:  # of the server, or data in the page itself
        return np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")).astype(int)


def upload(page, path):
    page.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(path))


def retype(page, selector, words):
    field = page.find_element(By.CSS_SELECTOR, selector)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(words, Keys.TAB)


def photograph(page, target):
    """Saves a screenshot of the whole page, in 256 colours."""
    page.set_window_size(1400, 1240)
    time.sleep(1)  # for the new layout
    shot = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")
    shot.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1).save(target, optimize=True)


def press(page):
    page.find_element(By.XPATH, "//button[text()='Segment']").click()


@pytest.mark.slow
def test_upload_type_segment(page, tmp_path):
    photo = Image.fromarray(scene("benchmark", 0).image[:160])
    photo.save(tmp_path / "photo.png")
    entries = ["red cross", "purple star", "wood, planks"]
    retype(page, "#classes textarea", "red cross, purple star, wood|planks")
    upload(page, tmp_path / "photo.png")
    preview = "//img[contains(@src, 'photo.png')]"
    wait(lambda: page.find_elements(By.XPATH, preview))
    press(page)
    wait(lambda: "of 280 patches" in text(page))  # 14 x 20, no more the example's 14 x 19

    encoder, tokenizer = create_model("scenes", config=SCCLIPConfig(multi_level=False))
    segmenter = Segmenter(encoder, tokenizer, entries, slide_crop=None, short_side=224)
    labels = segmenter(photo).numpy().astype(np.uint8)
    assert len(np.unique(labels)) > 1
    large = photo.resize((672, 480), Image.Resampling.BICUBIC)
    labels = labels.repeat(3, axis=0).repeat(3, axis=1)
    expected = np.asarray(segmentation.draw(large, labels, segmenter.classes))
    shown = picture(page, "#segmentation")
    assert shown.shape == expected.shape
    assert (shown != expected).any(axis=2).mean() < 0.002  # pixels that nearly tie


@pytest.mark.slow
def test_sliders_and_stages_change_the_result(page):
    assert "14 of 266 patches are outliers" in text(page)
    before = picture(page, "#scores")
    retype(page, "#outlier_contamination input[type=number]", "0.2")
    wait(lambda: "53 of 266 patches are outliers" in text(page))
    assert (picture(page, "#scores") != before).any()
    assert "without repair" in text(page)
    page.find_element(By.XPATH, "//label[span='repair']/input").click()
    wait(lambda: "with repair" in text(page))
    assert "without post aggregate" in text(page) and "with multi level" in text(page)


@pytest.mark.slow
def test_keys_move_a_slider(page):
    slider = page.find_element(By.CSS_SELECTOR, "#beta input[type=range]")
    before = picture(page, "#variants [aria-label^='Thumbnail 8 ']")
    slider.send_keys(Keys.HOME)
    wait(lambda: (picture(page, "#variants [aria-label^='Thumbnail 8 ']") != before).any())


@pytest.mark.slow
def test_errors_are_shown(page, tmp_path):
    def messages():
        return " ".join(
            alert.text for alert in page.find_elements(By.CSS_SELECTOR, "[data-testid=toast-text]")
        )

    retype(page, "#classes textarea", "sky, tree, sky")
    press(page)
    wait(lambda: "The list of classes names sky more than once" in messages())
    retype(page, "#classes textarea", "sky, tree")
    (tmp_path / "notes.png").write_text("no picture")
    upload(page, tmp_path / "notes.png")
    wait(lambda: page.find_elements(By.XPATH, "//img[contains(@src, 'notes.png')]"))
    press(page)
    unreadable = "cannot read the photo notes.png: not an image, or a damaged one"
    wait(lambda: unreadable in messages())
    (tmp_path / "large.png").write_bytes(bytes(2**20 + 1))
    upload(page, tmp_path / "large.png")
    message = "//*[contains(text(), 'exceed the maximum allowed size of 1')]"
    wait(lambda: page.find_elements(By.XPATH, message))
    assert "Traceback" not in page.page_source


@pytest.mark.slow
def test_nothing_leaves_this_machine(page, server):
    url, notes = server
    if target := os.environ.get("SCCLIP_FAST_SCREENSHOT"):
        photograph(page, target)
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = {request["request"]["url"] for request in sent}
    assert any(address.startswith(f"{url}assets/") for address in urls)
    assert not [u for u in urls if not u.startswith((url, "data:", "blob:"))]
    this_machine = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "None")
    connected = notes.read_text().split()
    assert set(connected) <= {*this_machine} and "127.0.0.1" in connected
