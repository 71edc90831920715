"""The page at GET /, in a real browser, against a real server of this process."""

import asyncio
import base64
import contextlib
import io
import json
import re
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, PATIENCE, Browser
from handwriting import DIGITS, smooth
from networks import with_seeded_weights
from PIL import Image

import skipnet_rt as srt
from skipnet_rt.data import digits_pictures
from skipnet_rt.model.preprocessing import CIFAR
from skipnet_rt.serving import Predictor, Settings

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from skipnet_rt.serving.app import create_app  # noqa: E402  # it needs what was just asked for
from skipnet_rt.serving.server import listening  # noqa: E402

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
              pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parents[2]
PORT = 0  # any that is free
IDLE = "document.querySelector('#result').ariaBusy === 'false'"


@contextlib.contextmanager
def serving(app, port: int = PORT):
    """A server of an application; its address."""
    listener = listening("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()


@pytest.fixture(scope="module")
def predictor():
    return Predictor()


@pytest.fixture(scope="module")
def server(predictor):
    with serving(create_app(predictor)) as address:
        yield address


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with contextlib.closing(Browser(tmp_path_factory.mktemp("profile"))) as browser:
        yield browser


@pytest.fixture
def browser(started):
    """A browser in which nothing has happened yet; nothing that it asks for in the test may be another machine's."""
    started.look()
    started.requests.clear()
    started.complaints.clear()
    yield started
    away = [address for address in started.requests if not address.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert away == [], "nothing from anywhere else"


@pytest.fixture
def page(browser, server):
    """The page, ready to be drawn on."""
    met(browser, server)
    yield browser
    assert browser.complaints == []


def met(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.until("document.querySelectorAll('#route .block').length === 18")


def draw(browser: Browser, digit: str) -> None:
    """A new drawing, by mouse, until its answer is there."""
    browser.press("Escape")
    strokes(browser, digit)
    browser.until(IDLE)


def strokes(browser: Browser, digit: str) -> None:
    left, top, width, height = browser.place("#board")
    for stroke in DIGITS[digit]:
        browser.drag([(left + width * x, top + height * y) for x, y in smooth(stroke)])


def drop(browser: Browser, name: str, data: bytes, event: str = "drop") -> None:
    """What the browser does when its user drops a file on the page, or pastes it."""
    kind = {"drop": "DragEvent('drop', {dataTransfer: held})",
            "paste": "ClipboardEvent('paste', {clipboardData: held})"}
    browser.evaluate(f"""{{
        const held = new DataTransfer();
        held.items.add(new File([new Uint8Array({list(data)})], {json.dumps(name)}));
        document.dispatchEvent(new {kind[event]});
    }}""")


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def seen(browser: Browser) -> Image.Image:
    """The picture that was sent."""
    address = browser.evaluate("document.querySelector('#seen').toDataURL()")
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def pixels(browser: Browser) -> np.ndarray:
    """That picture's, [8, 8], 0 to 1."""
    return np.asarray(seen(browser).convert("L")) / 255


def shown(browser: Browser) -> dict:
    """What stands there of a picture."""
    return {"label": browser.text("#label"), "probability": browser.text("#classes .number"),
            "route": browser.evaluate("[...document.querySelectorAll('#route .block')].map(b => b.matches('.ran'))"),
            "blocks": browser.text("#blocks"), "computation": browser.text("#computation")}


def expected(predictor: Predictor, picture: Image.Image | bytes) -> dict:
    (prediction,) = predictor.predict([picture])
    answer = predictor.to_dict(prediction)
    return {"label": answer["label"], "probability": f"{100 * answer['probability']:.1f} %", "route": answer["route"],
            "blocks": f"{answer['blocks_run']} of 18", "computation": f"{answer['computation']:.1f} %"}


def test_drawn_digits_are_recognised_and_what_is_shown_is_the_network_s_answer(page, predictor):
    """Ten drawings, and the picture of them in README: a copy of build/page.png, which stands there after this test."""
    page.look(width=1160, height=800)
    for digit in "6092174358":
        draw(page, digit)
        assert page.text("#label") == digit
        assert shown(page) == expected(predictor, seen(page))
    time, dense = (float(page.text(f"#{kind}").removesuffix(" ms")) for kind in ("time", "dense-time"))
    assert float(page.text("#faster").removesuffix("x")) == pytest.approx(dense / time, rel=.05)  # of rounded times
    named = page.evaluate("document.querySelector('#route').ariaLabel")
    assert named.startswith(f"{page.text('#blocks')} blocks ran: 1, ")
    page.click("#sort")
    ran = page.evaluate("[...document.querySelectorAll('.card')].map(card => card.querySelectorAll('.ran').length)")
    assert len(ran) == len(DIGITS)
    assert ran == sorted(ran), "easy and hard beside each other"
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    page.until("document.getAnimations().length === 0")
    (ROOT / "build").mkdir(exist_ok=True)
    page.screenshot(ROOT / "build" / "page.png")
    Image.open(ROOT / "build" / "page.png").quantize(128).save(ROOT / "build" / "page.png", optimize=True)


def test_small_thin_and_shifted_drawings_are_made_like_the_training_digits(page):
    """As high as the picture, six columns of eight wide, in the middle, with as much ink."""
    left, top, width, height = page.place("#board")
    page.press("Escape")
    for stroke in DIGITS["3"]:
        page.drag([(left + width * (.02 + .2 * x), top + height * (.7 + .25 * y)) for x, y in smooth(stroke)])
    page.until(IDLE)
    assert page.text("#label") == "3"
    picture = pixels(page)
    assert picture.sum() == pytest.approx(19.5, abs=.5)
    assert (picture.max(axis=1) > .2).all()
    assert (picture.max(axis=0) > .2).tolist() == [False] + 6 * [True] + [False]


def test_a_dot_and_a_dash_stay_what_they_are(page):
    left, top, width, height = page.place("#board")
    page.drag([(left + width / 2, top + height / 2)])
    page.until(IDLE)
    assert pixels(page)[[0, -1]].max() < .25
    page.press("Escape")
    page.drag([(left + .1 * width, top + height / 2), (left + .9 * width, top + height / 2)])
    page.until(IDLE)
    assert pixels(page)[[0, -1]].max() == 0


def test_a_picture_of_the_history_can_be_shown_again(page):
    for digit in "47":
        draw(page, digit)
    names = page.evaluate("[...document.querySelectorAll('.card strong')].map(name => name.innerText[0])")
    assert names == ["7", "4"], "the last one first"
    page.click("li:last-child .card")
    assert page.text("#label") == "4"
    assert page.evaluate("[...document.querySelectorAll('.card')].map(card => card.ariaCurrent)") == ["false", "true"]


def test_the_keyboard_is_enough(page):
    for _ in range(8):
        page.press("Tab")
        if page.evaluate("document.activeElement.id") == "board":
            break
    page.press(" ")
    for _ in range(5):
        page.press("ArrowDown", modifiers=8)
    page.press("ArrowUp")
    page.press(" ")
    page.until(IDLE)
    assert page.text("#label") == "1"
    assert page.text("#spoken") == f"1. Ran {page.text('#blocks')} blocks."
    page.press("Escape")
    page.press("ArrowUp", modifiers=8)
    page.press(" ")
    page.press(" ")
    page.until(f"{IDLE} && document.querySelectorAll('.card').length === 2")


def test_pictures_may_be_dropped_pasted_and_opened(page, predictor, tmp_path):
    pictures, _ = digits_pictures(held_out=True)
    files = [png(picture) for picture in pictures[:4]]
    for event, file, cards in (("drop", files[0], 1), ("paste", files[1], 2)):
        drop(page, "digit.png", file, event)
        page.until(f"document.querySelectorAll('.card').length === {cards} && {IDLE}")
        assert shown(page) == expected(predictor, file)
    for number in (2, 3):
        (tmp_path / f"{number}.png").write_bytes(files[number])
    root = page.send("DOM.getDocument")["root"]["nodeId"]
    page.send("DOM.setFileInputFiles", files=[str(tmp_path / "2.png"), str(tmp_path / "3.png")],
              nodeId=page.send("DOM.querySelector", nodeId=root, selector="#files")["nodeId"])
    page.until(f"document.querySelectorAll('.card').length === 4 && {IDLE}")
    assert shown(page) == expected(predictor, files[3])


def test_a_file_that_is_no_picture_is_named_and_the_next_one_is_answered(browser, server):
    met(browser, server)
    drop(browser, "letter.txt", b"Dear network")
    browser.until("!document.querySelector('#trouble').hidden")
    assert "letter.txt: " in browser.text("#trouble")
    assert "not a picture" in browser.text("#trouble")
    draw(browser, "2")
    assert browser.text("#label") == "2"
    assert browser.evaluate("document.querySelector('#trouble').hidden")


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back_answers_what_was_drawn_meanwhile(browser, predictor):
    with serving(create_app(predictor)) as address:
        met(browser, address)
    strokes(browser, "4")
    browser.until("document.querySelector('#trouble').innerText.includes('does not answer')")
    with serving(create_app(predictor), int(address.rstrip("/").rpartition(":")[2])):
        browser.until("document.querySelector('#trouble').hidden")
        browser.until(IDLE)
        assert browser.text("#label") == "4"


@pytest.mark.slow
def test_a_server_that_is_busy_is_asked_again(browser, predictor):
    """One request is all that it takes, and that one is held up."""
    free = threading.Event()

    async def infer(prepare):
        await asyncio.to_thread(free.wait, PATIENCE)
        return predictor.infer(*prepare(False))

    with serving(create_app(predictor, Settings(max_queue=1), infer)) as address:
        body = json.dumps({"files": [base64.b64encode(png(Image.new("L", (8, 8)))).decode()]}).encode()
        first = urllib.request.Request(f"{address}v1/predict", body, {"Content-Type": "application/json"})
        other = threading.Thread(target=lambda: urllib.request.urlopen(first).read())
        other.start()
        met(browser, address)
        while json.loads(urllib.request.urlopen(f"{address}v1/model").read()) and not _full(address):
            pass
        strokes(browser, "4")
        browser.until("document.querySelector('#trouble').innerText.includes('more to do than it can take')")
        free.set()
        browser.until(f"document.querySelector('#trouble').hidden && {IDLE}")
        assert browser.text("#label") == "4"
        other.join(PATIENCE)


def _full(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}readyz")
    except urllib.error.HTTPError as error:
        return error.code == 503
    return False


def test_a_server_with_a_token_is_given_it_and_its_limit_kept(browser, predictor):
    with serving(create_app(predictor, Settings(token="sesame", max_body=5000))) as address:
        browser.open(address)
        for given in ("guess", "sesame"):
            browser.until("!document.querySelector('#access').hidden")
            browser.send("Input.insertText", text=given)
            browser.press("Enter")
            if given == "guess":
                browser.until("document.querySelector('#trouble').innerText.includes('does not accept')")
                browser.evaluate("document.querySelector('#token').value = ''")
        met_after = "document.querySelectorAll('#route .block').length === 18"
        browser.until(met_after)
        draw(browser, "5")
        assert browser.text("#label") == "5"
        drop(browser, "large.png", bytes(5000))
        browser.until("document.querySelector('#trouble').innerText.includes('takes up to 5000 bytes')")
        browser.open(address)  # within a session it is asked for once
        browser.until(met_after)
        assert browser.evaluate("document.querySelector('#access').hidden")


def luminance(page: Browser, selector: str, colour: str) -> float:
    """Relative luminance (WCAG 2) of one of an element's colours."""
    shown = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{colour}")
    parts = [int(part) / 255 for part in re.findall(r"\d+", shown)[:3]]
    red, green, blue = (part / 12.92 if part <= .04045 else ((part + .055) / 1.055) ** 2.4 for part in parts)
    return .2126 * red + .7152 * green + .0722 * blue


def test_dark_light_and_narrow(page):
    """Contrast as WCAG 2 asks for: 4.5 of text, 3 of what must be told apart. Nothing sticks out at 320 pixels."""
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    draw(page, "7")
    for dark in (False, True):
        page.look(width=320, height=640, dark=dark)
        ground = luminance(page, "#result", "backgroundColor")
        assert (ground < .1) == dark
        for selector, colour, least in (("#label", "color", 4.5), ("#model", "color", 4.5),
                                        ("#route .ran", "backgroundColor", 3),
                                        ("#route .block:not(.ran)", "borderTopColor", 3)):
            darker, lighter = sorted((ground, luminance(page, selector, colour)))
            assert (lighter + .05) / (darker + .05) >= least, (selector, dark)
        assert page.evaluate("document.documentElement.scrollWidth") == 320


def test_a_network_of_many_blocks_and_other_classes(browser, tmp_path):
    """There is no paper where no digits are known, and a long route is folded on a narrow screen."""
    model = with_seeded_weights(srt.build("cifar10_rnn_gate_110"), seed=3, gate_bias=.1, gate_gain=3.0)
    model.card = srt.ModelCard(tuple(f"a kind of bird, number {number}" for number in range(10)), CIFAR)
    srt.save(model, tmp_path / "birds.safetensors")
    predictor = Predictor(tmp_path / "birds.safetensors")
    picture = png(digits_pictures(held_out=True)[0][0])
    with serving(create_app(predictor)) as address:
        browser.look(width=320, height=640)
        browser.open(address)
        browser.until("document.querySelectorAll('#route .block').length === 54")
        assert browser.evaluate("document.querySelector('#board').offsetParent") is None
        drop(browser, "bird.png", picture)
        browser.until(f"document.querySelectorAll('.card').length && {IDLE}")
        assert shown(browser)["route"] == expected(predictor, picture)["route"]
        assert browser.evaluate("document.documentElement.scrollWidth") == 320


def test_everything_one_can_reach_has_a_name(page):
    draw(page, "7")
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    reachable = [node for node in nodes if any(
        each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", ()))]
    assert len(reachable) >= 5  # the page itself, the paper, two buttons and a picture in the history
    assert [node for node in reachable if not node["name"]["value"]] == []
    roles = {node["role"]["value"] for node in nodes}
    assert {"heading", "main", "status", "region"} <= roles
