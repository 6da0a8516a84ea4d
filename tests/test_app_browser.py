"""The page in a real Chromium, as people use it: files, mouse, finger, keys, light and dark."""

import contextlib
import io
import math
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from helpers.tiny import METHODS, picture, png

import app
from util.files import UserError

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


SURE = [0.2, 0.3]  # the tiny model's captions are on all sides of them
LINK = "https://photos.example/two/lake.png?size=large"


def fetch(url, max_bytes):
    """Stand for the server's own fetching."""
    if url != LINK:
        raise UserError(f"there is no photo at {url}")
    return png(picture(8, (320, 200)))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "two colours.png"
    picture(3, (320, 200)).save(path)
    return path


@pytest.fixture(scope="module")
def address(captioner):
    model = {"name": "tiny", "about": "of a test", "warning": "Captions are wrong.", "sure": SURE}
    application = app.create_app(captioner, max_mb=1, model=model, fetch=fetch)
    server = app.create_server(application, app.Config(port=0))

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


def alternatives(page):
    return page.locator("#list li button > span:first-child").all_inner_texts()


def distinct(captions):
    return list(dict.fromkeys(each.text for each in captions))


def rating(caption):
    return ["unsure", "fairly sure", "sure"][sum(math.exp(caption.score) >= each for each in SURE)]


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
    assert alternatives(page) == distinct(best)[1:]
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
    # Over the camera and the address to the words.
    for key in ("Tab", "Tab", "Tab", "Tab", "ArrowRight", "End", "Home"):
        page.keyboard.press(key)
        about = page.evaluate(
            """() => [document.activeElement.textContent,
                      getComputedStyle(document.activeElement).outlineStyle]"""
        )
        assert about[1] == "solid"  # one sees where one is
        seen.append(about[0])
    assert seen == ["Take a photo", "", "Fetch", words[0], words[1], words[-1], words[0]]
    assert darkness(page) is not None
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "rating"
    expect(page.locator("#number")).to_have_css("opacity", "1")
    page.keyboard.press("Escape")
    expect(page.locator("#number")).to_have_css("opacity", "0")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "copy"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first alternative
    first, second, *others = distinct(captioner.candidates(photo, n=5))
    assert " ".join(words_of(page)) == second
    expect(page.get_by_role("status")).to_have_text(f"Shown: {second}.")
    assert alternatives(page) == [first, *others]
    page.keyboard.press("Enter")  # and back
    assert " ".join(words_of(page)) == first


def test_every_control_has_a_name_and_what_happens_is_said(open_page, photo, captioner):
    page = open_page(**DESKTOP)
    best = captioned(page, photo, captioner)
    expect(page.get_by_role("status")).to_have_text(
        f"Caption: {best[0].text}. {len(distinct(best)) - 1} alternatives below."
    )
    for role, name in [
        ("button", "Add photos"), ("button", "Take a photo"), ("button", "Copy"),
        ("button", "Fetch"), ("textbox", "Address of a photo"), ("heading", "Or try one of these"),
        ("button", "Chelsea the cat, by Stefan van der Walt"), ("region", "Caption"),
        ("toolbar", re.compile("Words of the caption")), ("radio", "Greedy"),
        ("slider", "Beams"), ("slider", "Longest caption"), ("list", "Alternatives"),
    ]:  # fmt: skip
        expect(page.get_by_role(role, name=name, exact=True)).to_have_count(1)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input")].filter((each) =>
             !each.textContent.trim() && !each.labels?.length && !each.ariaLabel &&
             !each.querySelector("img[alt]:not([alt=''])")).length"""
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
        texts = distinct(captioner.candidates(photo, n=n, method=method))
        assert [" ".join(words_of(page)), *alternatives(page)] == texts
        assert page.locator("#others").is_visible() == (len(texts) > 1)
    with page.expect_response("**/caption"):
        page.get_by_role("button", name="Draw again").click()
    expect(page.locator("main")).to_have_attribute("data-state", "done")
    texts = distinct(captioner.candidates(photo, n=5, method="sample", seed=1))
    assert [" ".join(words_of(page)), *alternatives(page)] == texts
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


def test_the_photos_of_a_dropped_folder_are_captioned_in_the_order_of_their_names(open_page):
    """Scripts can't make a folder: these stand for what a browser hands over."""
    page = open_page(**DESKTOP)
    page.evaluate(
        """(bytes) => {
          const file = (name, type) => ({ name, isFile: true,
            file: (done) => done(new File([new Uint8Array(bytes)], name, { type })) });
          const folder = (name, inside) => ({ name, isDirectory: true, createReader: () => {
            const parts = [inside.slice(0, 2), inside.slice(2), []]; // it lists some at a time
            return { readEntries: (done) => done(parts.shift()) };
          } });
          const photo = (name) => file(name, "image/png");
          const root = folder("holiday", [photo("10.png"), photo("9.png"),
            file("notes.txt", "text/plain"), folder("11 more", [photo("1.png")])]);
          const entries = [root, photo("alone.png")];
          const event = new Event("drop", { bubbles: true, cancelable: true });
          event.dataTransfer = { types: ["Files"], files: [],
            items: entries.map((entry) => ({ webkitGetAsEntry: () => entry })) };
          document.body.dispatchEvent(event);
        }""",
        list(png(picture(1))),
    )
    expect(page.get_by_role("status")).to_contain_text("All 4 photos have captions.")
    assert [name for name, _ in cards(page)] == ["9.png", "10.png", "1.png", "alone.png"]


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
        expect(page.locator("#unseen")).to_have_text("This browser can’t show this file.")
        assert page.locator("#retry").is_hidden()  # it would be refused again
    assert cards(page)[0] == ("notes.txt", "notes.txt is not an image that can be read (no image "
                              "format that is known)")  # fmt: skip
    look_at(page, "desktop-error")
    captioned(page, photo, captioner)
    assert page.get_by_role("alert").is_hidden()


def cards(page):
    """Return the name and the text of each photo's card."""
    names, texts = (page.locator(f"#cards {each}").all_inner_texts() for each in (".name", ".text"))
    return list(zip(names, texts, strict=True))


@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_several_photos_have_their_captions_in_order_and_none_vanishes(
    device, open_page, captioner, tmp_path
):
    page = open_page(**(PHONE if device == "phone" else DESKTOP), color_scheme="dark")
    paths = [tmp_path / f"{name}.png" for name in ("b", "a", "broken", "c")]
    for seed, path in enumerate(paths):
        picture(seed, (160, 120)).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:90])
    page.set_input_files("#file", paths)
    expect(page.get_by_role("status")).to_contain_text("3 of 4 photos have captions, 1 failed.")
    best = {path.stem: captioner.caption(path) for path in paths if path.stem != "broken"}
    found = cards(page)
    expect(page.locator("#cards button").first).to_have_accessible_name(f"b.png {best['b']}")
    assert [name for name, _ in found] == ["b.png", "a.png", "broken.png", "c.png"]
    assert found[2][1].startswith("broken.png is not an image that can be read (")
    assert [text for _, text in found[:2] + found[3:]] == [best["b"], best["a"], best["c"]]
    assert " ".join(words_of(page)) == best["b"]  # the first one is shown large
    for place, name in ((3, "c"), (1, "a")):
        page.locator("#cards button").nth(place).click()
        assert " ".join(words_of(page)) == best[name]
        assert page.locator("#photo").get_attribute("alt") == best[name]
        expect(page.locator("#cards [aria-current]")).to_contain_text(f"{name}.png")
    page.locator("#cards button").nth(2).click()
    expect(page.get_by_role("alert")).to_contain_text("broken.png is not an image")
    assert page.locator("#result").is_hidden()
    assert page.locator("#photo").get_attribute("alt") == "broken.png"
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert {
        text: ratio for text, ratio in page.evaluate(LOOK_CONTRAST).items() if ratio < 4.5
    } == {}
    look_at(page, f"{device}-several")
    page.get_by_role("radio", name="Greedy").check()  # of all of them
    expect(page.locator("#cards")).to_contain_text(captioner.caption(paths[3], method="greedy"))
    assert [name for name, _ in cards(page)] == ["b.png", "a.png", "broken.png", "c.png"]


def test_photos_that_are_added_join_those_that_are_there(open_page, photo, captioner, tmp_path):
    page = open_page(**DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    captioned(page, photo, captioner)
    assert page.locator(".strip").is_hidden()
    other = tmp_path / "other.png"
    picture(5).save(other)
    captioned(page, other, captioner)
    both = [(path.name, captioner.caption(path)) for path in (photo, other)]
    assert cards(page) == both
    page.get_by_role("button", name="Copy all").click()
    expect(page.locator("#copy-all")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "\n".join(f"{name}\t{text}" for name, text in both)
    page.get_by_role("button", name="Remove this one").click()
    assert " ".join(words_of(page)) == both[0][1] and cards(page) == both[:1]
    assert page.evaluate("document.activeElement.id") == "choose"
    captioned(page, other, captioner)
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator("main")).to_have_attribute("data-state", "empty")
    assert cards(page) == [] and page.locator("#drop").is_visible()
    captioned(page, photo, captioner)


def test_photos_that_failed_can_be_tried_again(open_page, photo, captioner, tmp_path):
    page = open_page(**DESKTOP)
    other = tmp_path / "other.png"
    picture(5).save(other)
    busy = {"status": 503, "json": {"error": "too many photos are waiting; try again in a minute"}}
    page.route("**/caption", lambda route: route.fulfill(**busy), times=2)
    page.set_input_files("#file", [photo, other])
    expect(page.get_by_role("status")).to_contain_text("0 of 2 photos have captions, 2 failed.")
    expect(page.get_by_role("alert")).to_have_text(f"{busy['json']['error']}.")
    page.get_by_role("button", name="Try again", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("All 2 photos have captions.")
    assert cards(page) == [(path.name, captioner.caption(path)) for path in (photo, other)]
    assert page.get_by_role("alert").is_hidden()


@pytest.mark.parametrize("way", ["field", "field without https", "paste", "drop"])
def test_the_photo_at_an_address_is_captioned(way, open_page, captioner):
    """The server fetches it: the page itself asks nobody else (see `open_page`)."""
    page = open_page(**DESKTOP)
    if way.startswith("field"):
        page.get_by_label("Address of a photo").fill(LINK[8:] if "without" in way else LINK)
        page.keyboard.press("Enter")
    else:
        page.evaluate(
            """([kind, link]) => {
              const data = new DataTransfer();
              data.setData(kind === "drop" ? "text/uri-list" : "text/plain", link);
              const about = { bubbles: true, cancelable: true };
              document.body.dispatchEvent(kind === "drop"
                ? new DragEvent("drop", { ...about, dataTransfer: data })
                : new ClipboardEvent("paste", { ...about, clipboardData: data }));
            }""",
            [way, LINK],
        )
    expect(page.locator("main")).to_have_attribute("data-state", "done")
    assert " ".join(words_of(page)) == captioner.caption(picture(8, (320, 200)))
    assert page.locator("#photo").evaluate("image => image.naturalWidth") == 320
    assert cards(page)[0][0] == "lake.png"


def test_an_address_that_leads_nowhere_gets_a_line_and_stays(open_page):
    page = open_page(**DESKTOP)
    page.get_by_label("Address of a photo").fill("a dog")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text(
        "Enter the address of a photo, as example.org/dog.jpg."
    )
    page.get_by_label("Address of a photo").fill("https://photos.example/gone.png")
    page.keyboard.press("Enter")
    message = "there is no photo at https://photos.example/gone.png"
    expect(page.get_by_role("alert")).to_have_text(f"{message}.")
    assert cards(page) == [("gone.png", message)]
    expect(page.locator("#unseen")).to_have_text("There is no photo to show.")


def test_a_sample_is_captioned_and_credited(open_page, captioner):
    page = open_page(**DESKTOP)
    expect(page.locator("#samples button")).to_have_count(
        len(app.cards.list_examples(app.EXAMPLES))
    )
    page.get_by_role("button", name="a dahlia, by vultilion").click()
    expect(page.locator("main")).to_have_attribute("data-state", "done")
    assert " ".join(words_of(page)) == captioner.caption(app.EXAMPLES / "flower.jpg")
    credit = page.get_by_role("link", name="a dahlia, by vultilion (CC BY 2.0)")
    assert credit.get_attribute("href").startswith("https://www.flickr.com/photos/vultilion/")
    page.get_by_role("button", name="Chelsea the cat").click()
    expect(page.locator("#credit")).to_have_text(
        "Photo: Chelsea the cat, by Stefan van der Walt (CC0)"
    )


def test_scores_are_words_with_the_number_beside_them(open_page, photo, captioner):
    page = open_page(**DESKTOP)
    best, *others = captioned(page, photo, captioner)
    expect(page.locator("#model")).to_have_text("Model: tiny (of a test).")
    expect(page.locator("#warning")).to_have_text("Captions are wrong.")
    share = f"{round(100 * math.exp(best.score))} %"
    button = page.get_by_role("button", name=rating(best), exact=True)
    expect(button).to_have_accessible_description(re.compile(f"^Each word was {share} probable"))
    expect(page.locator("#number")).to_have_css("opacity", "0")
    button.hover()
    expect(page.locator("#number")).to_have_css("opacity", "1")
    rows = page.locator("#list li button")
    by_text = {each.text: each for each in others}
    for place, text in enumerate(alternatives(page)):
        number = f"{round(100 * math.exp(by_text[text].score))} % per word"
        expect(rows.nth(place)).to_have_accessible_name(f"{text} {rating(by_text[text])} {number}")
    rows.first.focus()
    page.keyboard.press("Tab")
    expect(rows.nth(1).locator(".number")).to_have_css("opacity", "1")


def test_a_model_that_sees_few_parts_shows_them_as_they_are(open_page, photo, captioner):
    page = open_page(**DESKTOP)
    captioned(page, photo, captioner)
    rows, columns = captioner.explain(photo)[0].attention.shape[1:]
    assert (rows, columns) == (4, 4)
    page.locator("#caption button").first.hover()
    expect(page.locator("#look")).to_contain_text(
        "of the 4\u00a0×\u00a04 parts that this model sees"
    )
    shades = page.evaluate(
        """() => {
          const veil = document.getElementById("veil");
          const { data } = veil.getContext("2d").getImageData(0, 0, veil.width, veil.height);
          return new Set(data.filter((_, index) => index % 4 === 3)).size;
        }"""
    )
    assert shades <= rows * columns


def test_a_server_that_is_gone_is_told(open_page, photo):
    page = open_page(**DESKTOP)
    page.route("**/caption", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    page.set_input_files("#file", photo)
    expect(page.get_by_role("alert")).to_have_text(
        "The server can’t be reached. Is it still running?"
    )
