"""The page in a real Chromium, as people use it: files, mouse, finger, keys, light and dark."""

import contextlib
import io
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from helpers.tiny import METHODS, picture

import app

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright.expect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Chromium itself asks for updates and more at its start; with these it asks for nothing.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
WAIT = 30_000  # milliseconds: machines that are busy
# A folder to put pictures of the page into, to look at.
SCREENSHOTS = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "two colours.png"
    picture(3, (320, 200)).save(path)
    return path


@pytest.fixture(scope="module")
def address(captioner):
    server = app.create_server(app.create_app(captioner, max_mb=1), app.Config(port=0))

    def run():
        with contextlib.suppress(OSError):  # it is closed while it waits
            server.run()

    threading.Thread(target=run, daemon=True).start()
    yield f"http://127.0.0.1:{server.effective_port}/"
    server.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with playwright.sync_playwright() as tools:
        try:
            chromium = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=WAIT)
        except playwright.Error as error:
            pytest.skip(f"{CHROMIUM} does not start: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, address):
    """Open the page; at the end it has complained of nothing and asked nobody else."""
    expect.set_options(timeout=WAIT)
    contexts, complaints, asked = [], [], []

    def opened(**settings):
        context = browser.new_context(**settings)
        context.set_default_timeout(WAIT)
        context.on("request", lambda request: asked.append(request.url))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("filechooser", lambda chooser: None)  # else it is listened for only too late
        with page.expect_response("**/health"):
            page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    # Chromium's own note of an answer that is an error is no fault of the page.
    assert [each for each in complaints if "server responded with a status" not in each] == []
    elsewhere = [url for url in asked if not url.startswith((address, f"blob:{address}"))]
    assert asked and elsewhere == []


def words_of(page):
    return page.locator("#caption button").all_inner_texts()


def captioned(page, photo, captioner, **settings):
    """Have a photo captioned and check that the page shows what the model says."""
    page.set_input_files("#file", photo)
    expect(page.locator("main")).to_have_attribute("data-state", "done")
    best = captioner.candidates(photo, n=5, **settings)
    assert " ".join(words_of(page)) == best[0].text
    return best


def look_at(page, name):
    if SCREENSHOTS:
        page.wait_for_timeout(400)  # the veil fades in
        page.screenshot(path=Path(SCREENSHOTS, f"{name}.png"), full_page=True)


def darkness(page):
    """Return how dark the veil over the photo is at its darkest and its lightest, 0 to 255."""
    return page.evaluate(
        """() => {
          const veil = document.getElementById("veil");
          if (!veil.classList.contains("shown")) return null;
          const { data } = veil.getContext("2d").getImageData(0, 0, veil.width, veil.height);
          const alphas = data.filter((_, index) => index % 4 === 3);
          return [Math.max(...alphas), Math.min(...alphas)];
        }"""
    )


LOOK_CONTRAST = """() => {
  const light = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility()) continue;
    const both = [light(getComputedStyle(element).color), light(behind(element))];
    found[text] = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_a_photo_is_captioned_and_a_word_shows_where_it_looked(
    device, scheme, open_page, photo, captioner
):
    phone = device == "phone"
    page = open_page(**(PHONE if phone else DESKTOP), color_scheme=scheme)
    look_at(page, f"{device}-{scheme}-empty")
    best = captioned(page, photo, captioner)
    rows = page.locator("#list li button > span:first-child").all_inner_texts()
    assert rows == [each.text for each in best]
    assert all(
        re.fullmatch(r"\d+ %|below 1 %", each) for each in page.locator(".share").all_inner_texts()
    )
    assert page.locator("#photo").get_attribute("alt") == best[0].text
    assert darkness(page) is None
    word = page.locator("#caption button").nth(1)
    word.tap() if phone else word.hover()
    darkest, lightest = darkness(page)
    assert darkest > 150 and lightest == 0
    assert page.locator("#look").inner_text().startswith(f"{word.inner_text()} looked most at the ")
    # Nothing sticks out at the side, and all text can be read (WCAG AA).
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    ratios = page.evaluate(LOOK_CONTRAST)
    assert len(ratios) > 10
    assert {text: ratio for text, ratio in ratios.items() if ratio < 4.5} == {}
    look_at(page, f"{device}-{scheme}-look")


def test_the_photo_is_covered_by_what_shows_where_a_word_looked(open_page, photo, captioner):
    page = open_page(**DESKTOP)
    captioned(page, photo, captioner)
    over, under = (page.locator(each).bounding_box() for each in ("#veil", "#photo"))
    assert over == pytest.approx(under, abs=1)
    assert under["width"] / under["height"] == pytest.approx(1.6, rel=0.02)
    page.locator("#caption button").first.hover()
    page.locator("h1").hover()
    assert darkness(page) is None  # gone with the mouse


def test_the_page_works_by_keys_alone(open_page, photo, captioner):
    page = open_page(**DESKTOP)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photo)
    expect(page.locator("main")).to_have_attribute("data-state", "done")
    words = words_of(page)
    seen = []
    for key in ("Tab", "Tab", "ArrowRight", "End", "Home"):  # over the camera to the words
        page.keyboard.press(key)
        about = page.evaluate(
            """() => [document.activeElement.textContent,
                      getComputedStyle(document.activeElement).outlineStyle]"""
        )
        assert about[1] == "solid"  # one sees where one is
        seen.append(about[0])
    assert seen == ["Take a photo", words[0], words[1], words[-1], words[0]]
    assert darkness(page) is not None
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "copy"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the second caption
    second = captioner.candidates(photo, n=5)[1].text
    assert " ".join(words_of(page)) == second
    expect(page.get_by_role("status")).to_have_text(f"Shown: {second}.")


def test_every_control_has_a_name_and_what_happens_is_said(open_page, photo, captioner):
    page = open_page(**DESKTOP)
    best = captioned(page, photo, captioner)
    expect(page.get_by_role("status")).to_have_text(
        f"Caption: {best[0].text}. {len(best) - 1} alternatives below."
    )
    for role, name in [
        ("button", "Choose another"), ("button", "Take a photo"), ("button", "Copy"),
        ("toolbar", re.compile("Words of the caption")), ("radio", "Greedy"),
        ("slider", "Beams"), ("slider", "Longest caption"), ("list", "Alternatives"),
    ]:  # fmt: skip
        expect(page.get_by_role(role, name=name, exact=True)).to_have_count(1)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input")].filter((each) =>
             !each.textContent.trim() && !each.labels?.length && !each.ariaLabel).length"""
    )
    assert nameless == 0


def test_the_caption_is_copied(open_page, photo, captioner, address):
    page = open_page(**DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    best = captioned(page, photo, captioner)
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == best[0].text


def test_changing_a_setting_captions_the_photo_anew(open_page, photo, captioner):
    page = open_page(**DESKTOP)
    captioned(page, photo, captioner)
    for method in METHODS[1:]:
        with page.expect_response("**/caption"):
            page.get_by_role("radio").and_(page.locator(f"[value={method}]")).check()
        n = 1 if method == "greedy" else 5
        expect(page.locator("main")).to_have_attribute("data-state", "done")
        texts = [each.text for each in captioner.candidates(photo, n=n, method=method)]
        assert page.locator("#list li button > span:first-child").all_inner_texts() == texts
        assert page.locator("#others").is_visible() == (n > 1)
    with page.expect_response("**/caption"):
        page.get_by_role("button", name="Draw again").click()
    expect(page.locator("main")).to_have_attribute("data-state", "done")
    texts = [each.text for each in captioner.candidates(photo, n=5, method="sample", seed=1)]
    assert page.locator("#list li button > span:first-child").all_inner_texts() == texts
    with page.expect_response("**/caption"):
        page.get_by_role("radio", name="Beam search").check()
    with page.expect_response("**/caption"):
        page.get_by_label("Longest caption").fill("2")
    expect(page.locator("main")).to_have_attribute("data-state", "done")
    assert len(words_of(page)) <= 2
    expect(page.locator("output[for=max_words]")).to_have_text("2 words")


def test_a_photo_can_be_dropped_or_pasted(open_page, photo, captioner):
    page = open_page(**DESKTOP)
    hand_over = """([kind, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "photo.png", { type: "image/png" }));
      const about = { bubbles: true, cancelable: true };
      document.body.dispatchEvent(kind === "drop"
        ? new DragEvent("drop", { ...about, dataTransfer: data })
        : new ClipboardEvent("paste", { ...about, clipboardData: data }));
    }"""
    for seed, kind in enumerate(("drop", "paste")):
        stream = io.BytesIO()
        picture(seed).save(stream, "PNG")
        with page.expect_response("**/caption"):
            page.evaluate(hand_over, [kind, list(stream.getvalue())])
        expect(page.locator("main")).to_have_attribute("data-state", "done")
        assert " ".join(words_of(page)) == captioner.caption(picture(seed))


def test_a_photo_can_be_taken_with_the_camera(open_page):
    page = open_page(**DESKTOP, permissions=["camera"])
    page.get_by_role("button", name="Take a photo").click()
    expect(page.locator("#video")).to_have_js_property("readyState", 4)  # there is a picture
    look_at(page, "desktop-camera")
    page.get_by_role("button", name="Take the photo").click()
    expect(page.locator("main")).to_have_attribute("data-state", "done")
    assert words_of(page)
    assert page.evaluate("document.getElementById('video').srcObject") is None  # it is off again


def test_a_file_that_is_no_photo_gets_a_line_and_the_next_one_a_caption(
    open_page, photo, captioner, tmp_path
):
    page = open_page(**DESKTOP)
    text, large = tmp_path / "notes.txt", tmp_path / "large.png"
    text.write_text("What a day!")
    large.write_bytes(bytes(1_200_000))
    for path, message in [
        (text, "notes.txt is not an image that can be read (no image format that is known)."),
        (large, "This file has 1.2 MB; at most 1 MB are taken."),
    ]:
        page.set_input_files("#file", path)
        expect(page.get_by_role("alert")).to_have_text(message)
        assert page.locator("#result").is_hidden()
    look_at(page, "desktop-error")
    captioned(page, photo, captioner)
    assert page.get_by_role("alert").is_hidden()


def test_a_server_that_is_gone_is_told(open_page, photo):
    page = open_page(**DESKTOP)
    page.route("**/caption", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    page.set_input_files("#file", photo)
    expect(page.get_by_role("alert")).to_have_text(
        "The server can’t be reached. Is it still running?"
    )
