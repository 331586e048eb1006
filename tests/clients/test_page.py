"""The chat page in a real browser: Debian's chromium, driven by Playwright."""

import re
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="scripts/test_clients runs these")

from tests.clients.conftest import KEY  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
expect = playwright.expect
expect.set_options(timeout=20_000)  # milliseconds: for a busy machine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a server's page; afterwards nothing may have failed in it, or been asked of anybody else."""
    opened = []

    def opening(url: str, **options):
        page = browser.new_context(**options).new_page()
        failed, asked = [], []
        page.on("pageerror", lambda error: failed.append(error))
        page.on("request", lambda request: asked.append(request.url))
        opened.append((url, page, failed, asked))
        page.goto(url)
        return page

    yield opening
    for url, page, failed, asked in opened:
        page.context.close()
        assert not failed
        assert asked and all(each.startswith(url) for each in asked)


def say(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def last_answer(page):
    return page.locator(".message.assistant").last


def test_an_answer_streams_and_is_counted(servers, open_page):
    page = open_page(servers.parrot)
    expect(page.locator("#model")).to_have_text("parrot")
    expect(page.locator("#cache")).to_have_text(re.compile(r"^cache \d+\.\d %$"))
    say(page, "nothing <b>is</b> markup\n```\ncode\n```")
    answer = last_answer(page)
    expect(answer.locator(".text")).to_contain_text("nothing <b>is</b> markup")
    expect(answer.locator("code")).to_have_text("code")
    expect(answer.locator(".figures")).to_have_text(
        re.compile(r"^\d+ tokens, \d.* tokens/s, first after .* from the cache$")
    )
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    say(page, "and again")
    expect(last_answer(page).locator(".text")).to_have_text("and again")
    expect(page.locator(".message")).to_have_count(4)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)


def test_stop_ends_the_request(servers, open_page):
    page = open_page(servers.narrow)
    say(page, "word " * 400)
    expect(last_answer(page).locator(".text")).to_contain_text("word word word")
    page.get_by_role("button", name="Stop").click()
    expect(last_answer(page).locator(".figures")).to_have_text(re.compile("stopped$"))
    assert len(last_answer(page).locator(".text").inner_text()) < len("word " * 400)
    say(page, "next")  # its one place is free again
    expect(last_answer(page).locator(".text")).to_have_text("next")


def test_settings_are_sent_and_kept(servers, open_page):
    page = open_page(servers.parrot)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Most tokens").fill("5")
    page.get_by_label("System prompt").fill("Be a parrot.")
    page.get_by_label("API key").fill("mine")
    page.get_by_label("API key").blur()
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "how much is kept of this?")
    body = sent.value.post_data_json
    assert body["temperature"] == 0.3 and body["max_completion_tokens"] == 5
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert sent.value.headers["authorization"] == "Bearer mine"
    expect(last_answer(page).locator(".figures")).to_have_text(re.compile("^5 tokens"))
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.3")
    assert "mine" not in page.evaluate("JSON.stringify(localStorage)")  # the key ends with the tab


def test_a_server_with_keys_asks_for_one(servers, open_page):
    page = open_page(servers.tiny)
    expect(page.locator("#status")).to_contain_text("wants an API key")
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").blur()
    expect(page.locator("#model")).not_to_be_empty()
    expect(page.locator("#status")).to_be_empty()


def test_a_refusal_is_shown(servers, busy, open_page):
    page = open_page(servers.narrow)
    say(page, "is there room?")
    expect(page.locator(".error")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_fits_and_can_be_read(servers, open_page, tmp_path, size, scheme):
    page = open_page(servers.parrot, viewport=size, color_scheme=scheme)
    page.get_by_role("button", name="Settings").click()
    say(page, f"a{'b' * 300} long word, and words enough to fill more than one line of any screen " * 3)
    expect(last_answer(page).locator(".figures")).to_contain_text("from the cache")
    wide, shown = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= shown, "it scrolls sideways"
    for name in ("Send", "New chat", "Settings"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
    colours = page.evaluate("(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))")
    text, back = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert abs(text - back) > 450 and (back > text) == (scheme == "light")
    page.screenshot(path=tmp_path / "page.png")
