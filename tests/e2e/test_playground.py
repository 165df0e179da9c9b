"""What somebody sees who opens the playground in a browser: the real page, the real server, the real base.

Longer than most files because all of it shares one server and one browser.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, Route, expect

from tests.browsers import find_chromium, run_chromium
from tests.e2e.server_process import ADMIN_KEY, ServerProcess

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed: apt-get install chromium"),
]

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
DOMAINS = ["chat", "code", "math", "medical", "reasoning"]
MATH = "A box holds 12 eggs. How many eggs are in 7 boxes?"
MEDICAL = "What are the symptoms of iron deficiency anemia?"
WAIT_MILLISECONDS = 15_000
NO_NUMBER = "\N{EN DASH}"
PHONE = {"width": 360, "height": 740}
CHAT = "/v1/chat/completions"
LONG = "Tell me a long story about a lighthouse keeper."
FIRST_PIECE = f"data: {json.dumps({'choices': [{'delta': {'content': 'Eggs are'}}]})}\n\n"
SCORES = {f"domain-{number}": number / 100 for number in range(10)}
REPORT = {"scores": SCORES, "mix": {"domain-9": 0.09}, "cold": [], "seconds": {"decode": 1}}
MANY_DOMAINS = f"data: {json.dumps({'choices': [], 'brainstacks': REPORT})}\n\ndata: [DONE]\n\n"
LATE_ERROR = f"data: {json.dumps({'error': {'message': 'the engine failed', 'code': 'engine_failed'}})}\n\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(DEMO_STORE, folder / "store")
    settings = {"store__import_root": DEMO_STORE, "server__api_keys": "secret"}
    with ServerProcess(folder / "store", folder / "log", **settings) as process:
        process.http.headers["authorization"] = "Bearer secret"
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with run_chromium() as browser:
        yield browser


@dataclass
class Visit:
    """One browser profile, and everything that its pages asked for and complained about."""

    context: BrowserContext
    page: Page
    url: str
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, view: str = "chat", *, api_key: str | None = "secret", admin_key: str | None = None) -> Page:
        """The page with one of its views; the keys lie where the page itself keeps them."""
        keys = {"brainstacks.api-key": api_key, "brainstacks.admin-key": admin_key}
        given = {name: key for name, key in keys.items() if key is not None}
        # Once: a reload finds what the page itself kept.
        self.page.add_init_script(
            f"if (!sessionStorage.length) for (const [name, key] of Object.entries({json.dumps(given)}))"
            " sessionStorage.setItem(name, key);"
        )
        self.page.goto(f"{self.url}/#{view}")
        return self.page

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What was sent to an endpoint, in order."""
        sent = [request.post_data for request in self.requests if urlsplit(request.url).path == path]
        return [json.loads(body) for body in sent if body is not None]


@pytest.fixture
def visit(server: ServerProcess, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """Ends with the two facts that hold for every visit: no other host, and nothing in the console."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1180, "height": 760}}))
    context.set_default_timeout(WAIT_MILLISECONDS)
    visit = Visit(context, context.new_page(), server.url)
    visit.page.on("request", lambda request: visit.requests.append(request))  # a method of a list takes no mark
    visit.page.on("console", lambda message: visit.complaints.append(message.text))
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    yield visit
    context.close()
    assert {urlsplit(request.url).netloc for request in visit.requests} == {urlsplit(server.url).netloc}
    refusals = [text for text in visit.complaints if "the server responded with a status of 4" in text]
    assert [text for text in visit.complaints if text not in refusals] == []


def ask(page: Page, question: str, *, tokens: int = 16) -> None:
    """Types a question and sends it by keyboard."""
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_label("Your question").fill(question)
    page.get_by_label("Your question").press("Enter")


def answers(page: Page) -> Locator:
    return page.locator("article[aria-busy=false]")


def mix_of(answer: Locator) -> dict[str, tuple[str, str]]:
    """domain -> (score, weight) as the table shows them."""
    rows = answer.locator("tbody tr").all()
    cells = [(row.locator(".name").inner_text(), row.locator("td.number").all_inner_texts()) for row in rows]
    return {name: (score, weight) for name, (score, weight) in cells}


def test_an_answer_streams_and_shows_its_mix_with_scores_threshold_floor_and_phases(visit: Visit) -> None:
    page = visit.open()
    ask(page, MATH, tokens=24)
    expect(page.locator("article[aria-busy=true] .text")).not_to_be_empty(timeout=WAIT_MILLISECONDS)
    expect(page.locator("article")).to_contain_text("Answered by math 0.9")  # the mix is told before the scores are
    answer = answers(page)
    expect(answer).to_have_count(1, timeout=WAIT_MILLISECONDS)
    shown = mix_of(answer)
    assert sorted(shown) == DOMAINS
    assert float(shown["math"][0]) > 0.9
    assert shown["math"][0] == shown["math"][1]
    assert (float(shown["chat"][0]), shown["chat"][1]) < (0.2, "0.20")
    assert shown["medical"][1] == NO_NUMBER
    assert list(shown)[:2] == ["math", "chat"]  # active domains first, by weight
    report = answer.locator(".report")
    for told in ("threshold 0.12", "floor 0.20", "route", "page in", "prefill", "decode", "tokens/s"):
        expect(report).to_contain_text(told)
    track = report.locator("tbody .track").first.bounding_box()
    line = report.locator("tbody .track .threshold").first.bounding_box()
    assert track is not None
    assert line is not None
    assert (line["x"] - track["x"]) / track["width"] == pytest.approx(0.12, abs=0.01)
    expect(page.locator("#announcer")).to_contain_text("Mix: math 0.9")


def test_a_conversation_goes_on_and_a_new_chat_forgets_it(visit: Visit) -> None:
    page = visit.open()
    ask(page, MATH)
    expect(answers(page)).to_have_count(1, timeout=WAIT_MILLISECONDS)
    first = answers(page).locator(".text").inner_text()
    ask(page, "And in 3 boxes?")
    expect(answers(page)).to_have_count(2, timeout=WAIT_MILLISECONDS)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    ask(page, MEDICAL)
    expect(answers(page)).to_have_count(1, timeout=WAIT_MILLISECONDS)
    expect(answers(page)).to_contain_text("cold")  # nobody asked for it before
    sent = [[message["content"] for message in body["messages"]] for body in visit.bodies(CHAT)]
    assert sent[0] == [MATH]
    assert sent[1] == [MATH, first, "And in 3 boxes?"]
    assert sent[2] == [MEDICAL]


def test_stop_keeps_what_came_and_frees_the_server(visit: Visit, server: ServerProcess) -> None:
    page = visit.open()
    ask(page, LONG, tokens=1500)
    expect(page.locator("article .text")).not_to_be_empty(timeout=WAIT_MILLISECONDS)
    wait_for_running(server, 1)
    page.get_by_role("button", name="Stop").click()
    expect(answers(page)).to_contain_text("Stopped.")
    wait_for_running(server, 0)
    ask(page, "And then?", tokens=2)
    expect(answers(page)).to_have_count(2, timeout=WAIT_MILLISECONDS)
    said = visit.bodies(CHAT)[-1]["messages"]
    assert [message["content"] for message in said] == [LONG, said[1]["content"], "And then?"]
    assert said[1]["content"].startswith(answers(page).first.locator(".text p").first.inner_text())


def wait_for_running(server: ServerProcess, count: int) -> None:
    """Until the engine works on so many requests."""
    ends = time.monotonic() + WAIT_MILLISECONDS / 1000
    while server.metric("brainstacks_requests_running") != count:
        assert time.monotonic() < ends, f"never {count} running"


@pytest.mark.parametrize(("rest", "code"), [("", "stream_broken"), (LATE_ERROR, "engine_failed")])
def test_an_answer_that_breaks_off_is_no_part_of_the_conversation(visit: Visit, rest: str, code: str) -> None:
    page = visit.open()
    broken = {"content_type": "text/event-stream", "body": FIRST_PIECE + rest}
    page.route(f"**{CHAT}", lambda route: route.fulfill(**broken), times=1)
    ask(page, MATH, tokens=2)
    expect(page.locator("article .text")).to_have_text("Eggs are")
    expect(page.get_by_role("alert")).to_contain_text(code)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".report")).to_have_count(1, timeout=WAIT_MILLISECONDS)
    expect(page.locator(".asked")).to_have_text([MATH])
    assert [message["content"] for message in visit.bodies(CHAT)[-1]["messages"]] == [MATH]


def test_a_connection_that_breaks_within_an_answer_is_told_in_words(visit: Visit) -> None:
    page = visit.open()
    expect(page.locator("#server")).to_contain_text("5 domains")
    page.evaluate(
        """(piece) => {
            const broken = { start: (to) => to.enqueue(new TextEncoder().encode(piece)),
                             pull: (to) => to.error(new TypeError("network error")) };
            window.fetch = async () => new Response(new ReadableStream(broken, { highWaterMark: 0 }));
        }""",
        FIRST_PIECE,
    )
    ask(page, MATH)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The connection broke before the answer was complete.")
    expect(alert.locator(".codes")).to_have_text("network")


def test_a_failed_question_stays_while_another_answer_streams(visit: Visit) -> None:
    page = visit.open()
    ask(page, MATH, tokens=100_000)
    again = page.get_by_role("button", name="Try again")
    expect(again).to_be_visible()
    ask(page, LONG, tokens=1500)
    expect(page.locator("article[aria-busy=true] .text")).not_to_be_empty(timeout=WAIT_MILLISECONDS)
    again.click()
    expect(page.locator(".asked")).to_have_text([MATH, LONG])
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("article[aria-busy=true]")).to_have_count(0)
    page.get_by_label("Max tokens").fill("2")
    again.click()
    expect(page.locator(".asked")).to_have_text([LONG, MATH])
    expect(page.locator(".report")).to_have_count(1, timeout=WAIT_MILLISECONDS)


def test_a_question_stays_in_its_field_until_the_server_takes_it(visit: Visit) -> None:
    page = visit.open(api_key=None)
    expect(page.get_by_role("alert")).to_contain_text("invalid_api_key")
    with page.expect_response("**/v1/models"):
        ask(page, MATH, tokens=2)
    expect(page.get_by_role("alert")).to_contain_text("invalid_api_key")
    expect(page.get_by_label("Your question")).to_have_value(MATH)
    held: list[Route] = []
    page.route("**/v1/models", lambda route: held.append(route), times=2)  # a method of a list takes no mark
    page.get_by_label("API key").fill("secret")
    page.get_by_label("Your question").press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_label("Your question").press("Enter")
    for route in held:
        route.continue_()
    expect(page.get_by_label("Your question")).to_have_value("")
    expect(page.locator(".report")).to_have_count(1, timeout=WAIT_MILLISECONDS)
    assert len(visit.bodies(CHAT)) == 1


def test_the_threshold_is_known_when_the_router_was_asked_too_often(visit: Visit) -> None:
    page = visit.open()
    expect(page.locator("#server")).to_contain_text("5 domains")
    limit = {"status": 429, "json": {"error": {"message": "too many requests", "code": "rate_limit_exceeded"}}}
    page.route("**/v1/route", lambda route: route.fulfill(**limit))
    with page.expect_response("**/v1/route"):
        page.get_by_role("button", name="New chat").click()
    ask(page, MATH, tokens=2)
    expect(page.locator(".report")).to_contain_text("threshold 0.12", timeout=WAIT_MILLISECONDS)


def test_sliders_force_the_mix_and_begin_at_the_last_answers(visit: Visit) -> None:
    page = visit.open()
    ask(page, MATH, tokens=2)
    expect(answers(page)).to_have_count(1, timeout=WAIT_MILLISECONDS)
    page.get_by_role("radio", name="Custom").check()
    assert float(page.get_by_role("slider", name="math").input_value()) > 0.9
    for domain in DOMAINS:
        page.get_by_role("slider", name=domain).fill("0")
    page.get_by_role("slider", name="code").fill("0.5")
    page.get_by_role("slider", name="medical").focus()
    page.keyboard.press("ArrowRight")
    ask(page, MATH, tokens=2)
    expect(answers(page)).to_have_count(2, timeout=WAIT_MILLISECONDS)
    assert mix_of(answers(page).nth(1)) == {"code": (NO_NUMBER, "0.50"), "medical": (NO_NUMBER, "0.05")}
    assert visit.bodies(CHAT)[-1]["brainstacks"] == {"mix": {"code": 0.5, "medical": 0.05}}
    page.get_by_role("radio", name="Base").check()
    ask(page, MATH, tokens=2)
    expect(answers(page).nth(2)).to_contain_text("Answered by the base alone.", timeout=WAIT_MILLISECONDS)


@pytest.mark.parametrize("visit", [{"viewport": {"width": 1180, "height": 760}, "color_scheme": "dark"}], indirect=True)
def test_two_mixes_answer_one_question_side_by_side_at_once(visit: Visit) -> None:
    page = visit.open("compare")
    page.locator("#side-b").get_by_role("radio", name="Custom").check()
    page.locator("#side-b").get_by_role("slider", name="code").fill("1")
    ask(page, MATH, tokens=32)
    expect(page.locator("article[aria-busy=true] .text:not(:empty)")).to_have_count(2, timeout=WAIT_MILLISECONDS)
    expect(answers(page)).to_have_count(2, timeout=WAIT_MILLISECONDS)
    left, right = answers(page).nth(0), answers(page).nth(1)
    assert float(mix_of(left)["math"][1]) > 0.9
    assert mix_of(right) == {"code": (NO_NUMBER, "1.00")}
    assert left.locator(".text").inner_text() != right.locator(".text").inner_text()
    a, b = visit.bodies(CHAT)
    assert (a["messages"], a["seed"]) == (b["messages"], b["seed"])
    boxes = left.bounding_box(), right.bounding_box()
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    told = page.locator("#announcer p").all_inner_texts()
    # One line when it begins and one for the whole of it.
    assert sorted(line[:9] for line in told) == ["Answer A ", "Answer A:", "Answer B ", "Answer B:"]


def test_clearing_the_comparison_leaves_the_chats_answer_running(visit: Visit) -> None:
    page = visit.open()
    ask(page, LONG, tokens=1500)
    expect(page.locator("article[aria-busy=true] .text")).not_to_be_empty(timeout=WAIT_MILLISECONDS)
    page.get_by_role("link", name="Compare").click()
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("link", name="Chat").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_a_wrong_api_key_is_told_and_the_right_one_mends_it_in_this_tab_only(visit: Visit) -> None:
    page = visit.open(api_key="wrong")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("the API key is missing or wrong")
    expect(alert).to_contain_text("invalid_api_key · status 401")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    expect(alert).to_have_count(0)
    ask(page, MATH, tokens=2)
    expect(answers(page)).to_contain_text("decode", timeout=WAIT_MILLISECONDS)
    kept = page.evaluate("({session: {...sessionStorage}, local: {...localStorage}, cookie: document.cookie})")
    assert kept == {"session": {"brainstacks.api-key": "secret"}, "local": {}, "cookie": ""}


def test_an_error_has_its_code_and_can_be_tried_again(visit: Visit) -> None:
    page = visit.open()
    ask(page, MATH, tokens=100_000)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("context_length_exceeded · status 400")
    page.get_by_label("Max tokens").fill("2")
    alert.get_by_role("button", name="Try again").click()
    expect(page.locator(".report")).to_have_count(1, timeout=WAIT_MILLISECONDS)
    assert len(visit.bodies(CHAT)[-1]["messages"]) == 1  # the failed turn is not part of the chat


def test_a_server_that_was_restarted_with_another_base_answers_the_next_try(visit: Visit) -> None:
    page = visit.open()
    models = {"json": {"data": [{"id": "another-base"}, {"id": "another-base:law"}]}}
    page.route("**/v1/models", lambda route: route.fulfill(**models), times=1)
    page.reload()
    expect(page.locator("#server")).to_have_text("another-base · 1 domain")
    ask(page, MATH, tokens=2)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("model_not_found")
    alert.get_by_role("button", name="Try again").click()
    expect(page.locator(".report")).to_have_count(1, timeout=WAIT_MILLISECONDS)
    expect(page.locator("#server")).to_contain_text("5 domains")


def test_what_the_page_itself_refuses_is_told_in_words(visit: Visit) -> None:
    page = visit.open(api_key="left\N{EN DASH}right")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The API key holds “\N{EN DASH}”")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_role("link", name="Store", exact=True).first.click()
    enter_admin_key(page, "\N{SNOWMAN}")
    expect(alert).to_contain_text("The admin key holds “\N{SNOWMAN}”")
    expect(alert).to_contain_text("Enter the right admin key")
    enter_admin_key(page, ADMIN_KEY)
    page.get_by_label("Name").fill("law")
    page.get_by_role("button", name="Register", exact=True).click()
    expect(alert).to_contain_text("Choose at least one stack file.")
    expect(alert.locator(".codes")).to_have_text("no_stacks")
    page.get_by_label("Stack files, one a round").set_input_files(
        {"name": "1.safetensors", "mimeType": "application/octet-stream", "buffer": b""}
    )
    page.get_by_role("button", name="Register", exact=True).click()
    expect(alert).to_contain_text("1.safetensors is empty.")
    expect(alert.locator(".codes")).to_have_text("empty_file")


def test_tiers_show_bytes_and_hit_rate_without_a_key_and_every_domain_with_it(visit: Visit) -> None:
    page = visit.open("store")
    tiers = page.locator("#tiers")
    expect(tiers).to_contain_text("device")
    expect(tiers).to_contain_text(re.compile(r"Hit rate\s*\d+ %"))
    expect(tiers).to_contain_text("needs the admin key")
    expect(page.locator("#domains-card")).to_be_hidden()

    enter_admin_key(page, "nonsense")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("the admin key is missing or wrong")
    expect(alert).to_contain_text("Enter the right admin key")
    expect(page.locator("#domains-card")).to_be_hidden()

    enter_admin_key(page, ADMIN_KEY)
    expect(alert).to_have_count(0)
    code = page.locator("[data-domain=code]")
    code.get_by_role("button", name="Pin code").click()
    expect(code).to_contain_text("pinned")
    expect(tiers.locator("li", has_text="code")).to_contain_text("pinned")
    page.get_by_role("button", name="Unpin code").click()
    expect(code).not_to_contain_text("pinned")
    page.get_by_role("button", name="Prefetch reasoning").click()
    expect(tiers.locator("li", has_text="reasoning")).to_contain_text("resident")
    page.get_by_role("button", name="Forget").click()
    expect(page.locator("#domains-card")).to_be_hidden()
    assert page.evaluate("sessionStorage.getItem('brainstacks.admin-key')") is None


def test_one_failed_look_at_the_cache_forgets_neither_pins_nor_the_key(visit: Visit) -> None:
    page = visit.open("store", admin_key=ADMIN_KEY)
    code = page.locator("[data-domain=code]")
    code.get_by_role("button", name="Pin code").click()
    expect(page.locator("#tiers li", has_text="code")).to_contain_text("pinned")
    failure = {"status": 400, "json": {"error": {"message": "try again", "code": "disk_failed"}}}
    page.route("**/admin/cache", lambda route: route.fulfill(**failure))
    expect(page.locator("#tiers")).to_contain_text("this is what was seen last")
    expect(page.locator("#tiers li", has_text="code")).to_contain_text("pinned")
    expect(code).to_contain_text("pinned")
    page.reload()
    expect(page.locator("#tiers")).to_contain_text("the server did not tell")
    expect(code).to_contain_text("pinned")  # as the list of domains says
    page.get_by_role("button", name="Unpin code").click()
    expect(code.get_by_role("button", name="Pin code", exact=True)).to_be_visible()
    page.unroute("**/admin/cache")
    expect(page.locator("#tiers li", has_text="code")).to_contain_text("resident")


def test_what_is_told_of_an_older_key_changes_nothing(visit: Visit) -> None:
    page = visit.open("store")
    held: list[Route] = []
    page.route("**/admin/domains", lambda route: held.append(route))
    with page.expect_request("**/admin/domains"):
        enter_admin_key(page, "nonsense")
    with page.expect_request("**/admin/domains"):
        enter_admin_key(page, ADMIN_KEY)
    with page.expect_response("**/admin/domains"):
        held[0].continue_()
    with page.expect_response("**/admin/domains"):
        held[1].continue_()
    expect(page.locator("[data-domain]")).to_have_count(len(DOMAINS))
    expect(page.get_by_role("alert")).to_have_count(0)
    with page.expect_request("**/admin/domains"):
        enter_admin_key(page, ADMIN_KEY)
    page.get_by_role("button", name="Forget").click()
    with page.expect_response("**/admin/domains"):
        held[2].continue_()
    with page.expect_response("**/metrics"):  # by when the page has read what came before
        pass
    expect(page.locator("#domains-card")).to_be_hidden()


def enter_admin_key(page: Page, key: str) -> None:
    page.get_by_label("Admin key").fill(key)
    page.get_by_label("Admin key").press("Enter")


def test_a_domain_in_use_drains_when_it_is_deleted_and_comes_back_by_upload(
    visit: Visit, server: ServerProcess
) -> None:
    page = visit.open("store", admin_key=ADMIN_KEY)
    domain = page.locator("[data-domain=medical]")
    expect(domain).to_contain_text("2 rounds")
    may_end = threading.Event()
    is_streaming = threading.Event()
    user = threading.Thread(target=_stream_until, args=(server, "medical", is_streaming, may_end))
    user.start()
    try:
        assert is_streaming.wait(timeout=60)
        expect(domain).to_contain_text("leased 1\N{MULTIPLICATION SIGN}")
        page.get_by_role("button", name="Delete medical").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(domain).to_have_count(0)
        expect(page.locator("#domains")).to_contain_text("medical is deleted and draining: 1 request still uses it.")
        expect(page.locator("#tiers li", has_text="medical")).to_contain_text("draining")
    finally:
        may_end.set()
        user.join(timeout=60)
    expect(page.locator("#domains")).to_contain_text("the last request that used it has ended")

    files = sorted((DEMO_STORE / "domains" / "medical").iterdir(), reverse=True)
    page.get_by_label("Name").fill("medical")
    page.get_by_label("Stack files, one a round").set_input_files(files)
    expect(page.locator(".rounds .name")).to_have_text([file.name for file in reversed(files)])  # in the rounds' order
    page.get_by_role("button", name="Check only").click()
    expect(page.locator("#register [role=status]")).to_contain_text("Valid: medical, 2 rounds")
    register = page.get_by_role("button", name="Register", exact=True)
    slow_uploads(visit, bytes_per_second=8_000_000)
    register.click()
    expect(page.get_by_label(f"Uploading {files[0].name} (2 of 2)")).to_have_attribute("value", re.compile(r"0\.[5-9]"))
    expect(page.get_by_label("Stack files, one a round")).to_be_disabled()  # nothing changes what is on its way
    expect(page.get_by_role("button", name="one round earlier")).to_be_disabled()
    cancel = page.get_by_role("button", name="Cancel")
    expect(cancel).to_be_focused()
    cancel.click()
    expect(register).to_be_focused()
    expect(page.locator("#register [role=status]")).to_contain_text("Cancelled; the store is as it was.")
    slow_uploads(visit, bytes_per_second=-1)
    held: list[Route] = []
    page.route("**/admin/domains/medical", lambda route: held.append(route), times=1)
    register.click()
    expect(page.get_by_label("Verifying and registering")).to_be_visible()
    expect(cancel).to_be_hidden()  # the server goes on whatever the page does
    held[0].continue_()
    expect(page.locator("#register [role=status]")).to_contain_text("Registered: medical, 2 rounds")
    expect(page.locator("[data-domain=medical]")).to_contain_text("on disk")
    generation = server.admin("GET", "/admin/domains").json()["generation"]
    expect(page.locator("#generation")).to_have_text(f"generation {generation}")


def slow_uploads(visit: Visit, *, bytes_per_second: int) -> None:
    """Lets the browser send no faster; -1 for as fast as it can."""
    conditions = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": bytes_per_second}
    visit.context.new_cdp_session(visit.page).send("Network.emulateNetworkConditions", conditions)


def _stream_until(server: ServerProcess, domain: str, is_streaming: threading.Event, may_end: threading.Event) -> None:
    body = {
        "messages": [{"role": "user", "content": MEDICAL}],
        "max_tokens": 1500,
        "stream": True,
        "ignore_eos": True,
        "brainstacks": {"mix": {domain: 1.0}},
    }
    headers = {"authorization": "Bearer secret"}
    with server.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        for line in response.iter_lines():
            if '"content"' in line:
                is_streaming.set()
            if may_end.is_set():
                return


def test_a_replacement_is_refused_when_the_store_has_changed_meanwhile(visit: Visit, server: ServerProcess) -> None:
    page = visit.open("store", admin_key=ADMIN_KEY)
    page.get_by_role("button", name="Replace math").click()
    expect(page.get_by_label("Name")).to_have_value("math")
    paths = sorted(str(file.relative_to(DEMO_STORE)) for file in (DEMO_STORE / "domains" / "math").iterdir())
    expect(page.get_by_label("Stack files, one a round")).to_be_focused()
    page.get_by_role("radio", name="Paths under").check()
    page.get_by_label("Paths, one a line").fill(paths[0])
    assert server.admin("DELETE", "/admin/domains/reasoning").status_code == 200  # by somebody else
    page.get_by_role("button", name="Replace", exact=True).click()
    alert = page.locator("#register").get_by_role("alert")
    expect(alert).to_contain_text("generation_conflict · status 412")
    expect(alert).to_contain_text("Somebody else changed the store")
    expect(page.locator("[data-domain=reasoning]")).to_have_count(0)  # the list is up to date
    page.get_by_role("button", name="Replace", exact=True).click()
    expect(page.locator("#register [role=status]")).to_contain_text("Registered: math, 1 round")
    page.get_by_label("Name").fill("math")
    page.get_by_role("radio", name="Paths under").check()
    page.get_by_label("Paths, one a line").fill("\n".join(paths))
    page.get_by_role("button", name="Replace", exact=True).click()
    expect(page.locator("#register [role=status]")).to_contain_text("Registered: math, 2 rounds")
    page.get_by_label("Name").fill("reasoning")
    page.get_by_role("radio", name="Files of").check()
    page.get_by_label("Stack files, one a round").set_input_files(
        sorted((DEMO_STORE / "domains" / "reasoning").iterdir())
    )
    page.get_by_role("button", name="Register", exact=True).click()
    expect(page.locator("#register [role=status]")).to_contain_text("Registered: reasoning, 2 rounds")


@pytest.mark.parametrize("visit", [{"viewport": PHONE, "has_touch": True, "is_mobile": True}], indirect=True)
def test_a_phone_shows_everything_without_scrolling_sideways(visit: Visit) -> None:
    page = visit.open(admin_key=ADMIN_KEY)
    ask_on_phone(page, MATH)
    expect(page.locator("#view-chat article[aria-busy=false] .report")).to_be_visible(timeout=WAIT_MILLISECONDS)
    assert overflowing(page) == []
    page.get_by_role("link", name="Compare").click()
    ask_on_phone(page, MEDICAL)
    expect(page.locator("#view-compare .report")).to_have_count(2, timeout=WAIT_MILLISECONDS)
    assert overflowing(page) == []
    expect(page.get_by_role("button", name="Clear")).to_have_css("font-size", "15px")  # a word, not a sign
    page.get_by_role("link", name="Store").click()
    expect(page.locator("[data-domain]")).to_have_count(len(DOMAINS))
    assert overflowing(page) == []
    typed = page.locator("textarea, input:not([type=range], [type=radio], [type=file])")
    sizes = typed.evaluate_all("(all) => all.map((e) => getComputedStyle(e).fontSize)")
    assert set(sizes) == {"16px"}  # phones zoom in on anything smaller


def ask_on_phone(page: Page, question: str) -> None:
    page.locator("#settings > summary").click()
    page.get_by_label("Max tokens").fill("4")
    assert overflowing(page) == []
    page.locator("#settings > summary").click()
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Send").tap()


def overflowing(page: Page) -> list[str]:
    """What reaches beyond the right edge of the page, and what has to be scrolled sideways."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("body, body *")]
            .filter((e) => e.checkVisibility() && !e.closest(".hidden, pre"))
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5
                || (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== "hidden" && e.clientWidth))
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    return found


@pytest.mark.parametrize("visit", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
def test_every_view_is_accessible_in_both_schemes(visit: Visit) -> None:
    page = visit.open(admin_key=ADMIN_KEY)
    assert violations(page) == []
    page.get_by_role("radio", name="Custom").check()
    ask(page, MATH, tokens=4)
    expect(page.locator("#view-chat .report")).to_be_visible(timeout=WAIT_MILLISECONDS)
    assert violations(page) == []
    page.get_by_role("link", name="Compare").click()
    ask(page, MATH, tokens=100_000)
    expect(page.get_by_role("alert")).to_have_count(2)
    assert violations(page) == []
    page.get_by_role("link", name="Store", exact=True).first.click()
    expect(page.locator("[data-domain]")).to_have_count(len(DOMAINS))
    assert violations(page) == []
    page.get_by_role("button", name="Delete code").click()
    assert violations(page) == []


def violations(page: Page) -> list[str]:
    """What axe finds against WCAG 2.2 AA and its best practices."""
    found = Axe().run(page).response["violations"]
    return [f"{rule['id']}: {node['html'][:120]} {node['failureSummary']}" for rule in found for node in rule["nodes"]]


def test_everything_works_by_keyboard_alone(visit: Visit) -> None:
    page = visit.open()
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type(MATH)
    page.get_by_label("Max tokens").fill("2")
    page.get_by_label("Your question").press("Enter")
    expect(answers(page)).to_have_count(1, timeout=WAIT_MILLISECONDS)
    page.reload()
    expect(page.get_by_label("Your question")).to_be_focused()
    order = [next_focus(page) for _ in range(6)]
    assert order == ["Send", "New chat", "Router", "Temperature", "Max tokens", "API key"]
    page.get_by_role("link", name="Skip to the content").focus()
    assert [next_focus(page) for _ in range(4)] == ["Chat", "Compare", "Store", "Dark theme"]
    page.get_by_role("radio", name="Router").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Custom")).to_be_focused()
    assert next_focus(page) == "chat"  # the first slider
    page.keyboard.press("End")
    expect(page.get_by_role("slider", name="chat")).to_have_value("1")
    page.get_by_role("link", name="Compare").press("Enter")
    expect(page.locator("#view-compare")).to_be_visible()


def test_the_focus_stays_near_what_was_used(visit: Visit) -> None:
    page = visit.page
    refused = {"status": 404, "json": {"error": {"message": "no", "code": "not_found"}}}
    page.route("**/v1/models", lambda route: route.fulfill(**refused), times=1)
    visit.open()
    page.get_by_role("button", name="Try again").press("Enter")
    expect(page.locator("#main")).to_be_focused()
    page.route(f"**{CHAT}", lambda route: route.fulfill(content_type="text/event-stream", body=MANY_DOMAINS))
    page.route(f"**{CHAT}", lambda route: route.fulfill(**refused), times=1)
    page.get_by_role("button", name="What is diabetes?").press("Enter")
    conversation = page.get_by_role("region", name="Conversation")
    expect(conversation).to_be_focused()
    page.get_by_role("button", name="Try again").press("Enter")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(conversation).to_be_focused()
    expect(page.locator(".report tbody tr:visible")).to_have_count(5)
    page.get_by_role("button", name="Show 5 domains more").press("Enter")
    expect(page.locator(".report tbody tr:visible")).to_have_count(10)
    expect(page.get_by_role("button", name="Show fewer")).to_be_focused()


def test_enter_of_an_input_method_sends_nothing(visit: Visit) -> None:
    page = visit.open()
    question = page.get_by_label("Your question")
    question.fill(MATH)
    for composing in ({"isComposing": True}, {"keyCode": 229}):  # the second is Safari's
        question.dispatch_event("keydown", {"key": "Enter", "bubbles": True, **composing})
        assert page.get_by_role("button", name="Stop").is_hidden()


def test_a_failure_that_lasts_is_read_out_once(visit: Visit) -> None:
    page = visit.page
    refused = {"status": 404, "json": {"error": {"message": "no metrics", "code": "not_found"}}}
    page.route("**/metrics", lambda route: route.fulfill(**refused))
    visit.open("store")
    box = page.locator("#tiers").get_by_role("alert")
    box.evaluate("(e) => { e.dataset.seen = 'before'; }")
    for _ in range(2):
        with page.expect_response("**/metrics"):
            pass
    expect(box).to_have_attribute("data-seen", "before")


def next_focus(page: Page) -> str:
    """Presses Tab, and what has the focus then, by the name that it tells."""
    page.keyboard.press("Tab")
    name: str = page.evaluate(
        """() => {
            const e = document.activeElement;
            return (e.ariaLabel ?? e.labels?.[0]?.textContent ?? e.textContent).trim();
        }"""
    )
    return name


def test_the_scheme_can_be_chosen_and_is_remembered(visit: Visit) -> None:
    page = visit.open()
    toggle = page.get_by_role("button", name="Dark theme")
    expect(toggle).to_have_attribute("aria-pressed", "false")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    toggle.click()
    expect(toggle).to_have_attribute("aria-pressed", "true")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    page.reload()
    expect(page.get_by_role("button", name="Dark theme")).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_the_page_works_where_the_browser_keeps_nothing(visit: Visit) -> None:
    page = visit.page
    page.add_init_script(
        """for (const name of ["localStorage", "sessionStorage"]) Object.defineProperty(window, name, {
            get() { throw new DOMException("site data is blocked", "SecurityError"); } });"""
    )
    page.goto(visit.url)
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Enter")
    expect(page.locator("#server")).to_contain_text("5 domains")
    page.get_by_role("button", name="Dark theme").click()
    expect(page.get_by_role("button", name="Dark theme")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("link", name="Store", exact=True).first.click()
    enter_admin_key(page, ADMIN_KEY)
    expect(page.locator("[data-domain]")).to_have_count(len(DOMAINS))


@pytest.mark.parametrize("visit", [{"reduced_motion": "reduce"}], indirect=True)
def test_nothing_moves_for_those_who_do_not_want_it(visit: Visit) -> None:
    page = visit.open()
    ask(page, MATH, tokens=200)
    waiting = page.locator("article[aria-busy=true] .text")
    expect(waiting).not_to_be_empty(timeout=WAIT_MILLISECONDS)
    assert waiting.evaluate("(e) => getComputedStyle(e, '::after').animationName") == "none"
    page.get_by_role("button", name="Stop").click()
