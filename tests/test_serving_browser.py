"""A person at the page: types, paints, takes the card home, draws it again. No other host is asked."""

import io
import os
import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("playwright")
import httpx
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from serving_tools import SERVE, apart, free_port, tiny_checkpoint

expect.set_options(timeout=90_000)                       # a busy machine is no broken page
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not CHROMIUM: pytest.skip("needs chromium: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    checkpoint = os.environ.get("POKEMON_TEST_CHECKPOINT") or tiny_checkpoint(tmp_path_factory.mktemp("browser"))
    port = free_port()
    p = subprocess.Popen([SERVE, "--port", str(port), "--checkpoint", str(checkpoint), "--device", "cpu", "--rate", ""])
    end = time.time() + 300
    try:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200: break
            except httpx.TransportError: pass
            assert p.poll() is None and time.time() < end
            time.sleep(.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        p.terminate()
        p.wait(60)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        b = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield b
        b.close()


@pytest.fixture
def page(browser, url):
    "An open page; afterwards: no request went elsewhere, nothing broke."
    context = browser.new_context(viewport=dict(width=1280, height=1000), accept_downloads=True)
    context.set_default_timeout(90_000)
    tab, asked, broken = context.new_page(), [], []
    tab.on("request", lambda r: asked.append(r.url))
    tab.on("pageerror", lambda e: broken.append(str(e)))
    tab.goto(url)
    expect(tab.get_by_role("button", name="Paint")).to_be_visible()
    yield tab
    hosts = {urlparse(a).netloc for a in asked if not a.startswith(("data:", "blob:"))}
    assert hosts == {urlparse(url).netloc} and not broken, (hosts, broken)
    context.close()


def shot(page, name):
    "A screenshot where POKEMON_SHOTS says, to be looked at."
    if folder := os.environ.get("POKEMON_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def paint(page, prompt, n=1):
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("number input for Pictures").fill(str(n))
    page.get_by_role("button", name="Paint").click()
    expect(page.get_by_text(f"{n} picture")).to_be_visible()
    expect(page.locator("#pictures img")).not_to_have_count(0)
    expect(page.locator("#card img")).to_be_visible()


def download(page, where):
    "The file behind the download button of an element."
    with page.expect_download() as d: page.locator(where).get_by_role("button", name="Download").or_(
            page.locator(f"{where} a[download]")).first.click()
    return Path(d.value.path()).read_bytes()


def test_paint_take_the_card_and_draw_it_again(page, tmp_path):
    paint(page, "a small fire creature", n=2)
    shot(page, "desktop")
    card = download(page, "#card")
    im = Image.open(io.BytesIO(card))
    assert im.size == (420, 600) and "small fire creature" in im.info["pokemon_nb"]
    first = httpx.get(page.locator("#pictures img").first.get_attribute("src")).content
    file = tmp_path/"card.png"
    file.write_bytes(card)
    page.get_by_label("Prompt").fill("something else")
    with page.expect_file_chooser() as chooser: page.get_by_role("button", name="Draw again").click()
    chooser.value.set_files(file)
    expect(page.get_by_text("1 picture in")).to_be_visible()
    expect(page.get_by_label("Prompt")).to_have_value("a small fire creature")
    again = httpx.get(page.locator("#pictures img").first.get_attribute("src")).content
    assert apart(Image.open(io.BytesIO(first)), Image.open(io.BytesIO(again))) <= 1


def test_by_keyboard_with_pickers_and_a_sentence_for_an_error(page):
    page.get_by_label("Colour").click()
    page.get_by_role("option", name="red").click()
    page.get_by_label("Type", exact=True).click()
    page.get_by_role("option", name="fire").click()
    expect(page.get_by_label("Prompt")).to_have_value("a red fire pokemon")
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("4 pictures in")).to_be_visible()
    focused = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        focused.add(page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''").strip())
    assert {"Re-roll", "Paint"} <= focused, focused
    page.get_by_label("Prompt").fill("bad \u0007 prompt")
    page.get_by_role("button", name="Paint").click()
    expect(page.get_by_text("prompt must be plain text")).to_be_visible()


def test_phone_and_dark(browser, url):
    for name, more in (("phone", {}), ("phone-dark", dict(color_scheme="dark"))):
        screen = dict(viewport=dict(width=390, height=844), device_scale_factor=2, has_touch=True)
        context = browser.new_context(**screen, **more)
        context.set_default_timeout(90_000)
        page = context.new_page()
        page.goto(url)
        expect(page.get_by_role("button", name="Paint")).to_be_visible()
        paint(page, "a blue turtle", n=4)
        shot(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out sideways"
        dark = page.evaluate("document.body.classList.contains('dark')")
        assert dark == (name == "phone-dark")
        context.close()
