"""The page of a study in a real browser, by mouse and by keyboard: what is exported is what was clicked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lm_envs.feedback.store import Judgment, Store
from lm_envs.feedback.study import SETTINGS, Item, Response, StudySettings, write_settings
from tests.house import CHECKOUT

pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

SERVER = """
import sys
from pathlib import Path
import uvicorn
from lm_envs.feedback.server import application
from lm_envs.feedback.store import open_study
app = application(open_study(Path(sys.argv[1])), ["127.0.0.1"])
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
"""
LONG = "\n\n".join(f"Paragraph {k} of a text that goes on for longer than a window is high." for k in range(40))
EVIL = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'><b onclick='window.ran = 1'>b</b> "
    "[a](javascript:window.ran=1) ![b](x)"
)


class Study:
    """A study with a server in a process of its own, which can be killed and started again on its port."""

    def __init__(
        self, folder: Path, mode: Any, responses: int, items: int = 3, text: str = "", texts: str = "", **settings: Any
    ) -> None:
        self.folder = folder
        given: dict[str, Any] = {"flags": {"harmful" + texts: "It harms." + texts}, "reasons": mode == "rank"}
        given |= {"question": "Which?" + texts, "instructions": texts, "overlap": 2, **settings}
        made = StudySettings("study" + texts, mode, **given)
        write_settings(folder / SETTINGS, asdict(made))
        self.store = Store(folder, made)
        rows = [
            tuple(Response(f"response {k} {r}{text}", f"policy {r}") for r in range(responses)) for k in range(items)
        ]
        prompts = [[{"role": "user", "content": f"prompt {k}{text}"}] for k in range(items)]
        self.store.add_items([Item(prompt, row) for prompt, row in zip(prompts, rows, strict=True)])
        self.port = 0
        self.start()

    def start(self) -> None:
        if not self.port:
            import socket

            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
        command = [sys.executable, "-c", SERVER, str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, cwd=CHECKOUT)
        import urllib.error
        import urllib.request

        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/static/page.css", timeout=1).read()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def link(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/a/{self.store.key(self.store.annotator(name))}/"

    def of(self, name: str) -> list[Judgment]:
        return [judgment for judgment in self.store.judgments() if judgment.annotator == name]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def studies(tmp_path: Path) -> Iterator[Any]:
    made: list[Study] = []

    def make(mode: str, responses: int, **options: Any) -> Study:
        folder = tmp_path / f"{mode}{len(made)}"
        folder.mkdir()
        made.append(Study(folder, mode, responses, **options))
        return made[-1]

    yield make
    for study in made:
        study.kill()


def opened(browser: Any, link: str, **options: Any) -> Any:
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(20_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(link)
    page.wait_for_selector(".card")
    return page


def shown(page: Any, place: int) -> str:
    return str(page.locator(".card > .text").nth(place).inner_text())


def answered(page: Any, count: int) -> None:
    page.get_by_text(f"{count} answered").wait_for()


def best(judgment: Judgment) -> str:
    return judgment.content.responses[judgment.answer.ranks.index(0)].text


def test_pairs_by_mouse_and_by_keyboard_and_back(browser: Any, studies: Any) -> None:
    study = studies("pair", 2)
    page = opened(browser, study.link("ann"))
    assert page.locator("#submit").is_disabled()
    wanted = [shown(page, 1)]
    page.get_by_role("button", name="B is better").click()
    page.locator("#submit").click()
    answered(page, 1)
    wanted.append(shown(page, 0))
    page.keyboard.press("a")
    page.keyboard.press("n")
    page.keyboard.type("typing b here chooses nothing")
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    answered(page, 2)
    page.keyboard.press("x")
    page.keyboard.press("Enter")
    page.get_by_text("All done").wait_for()
    first, second, third = study.of("ann")
    assert [best(first), best(second)] == wanted
    assert second.answer.notes == "typing b here chooses nothing"
    assert third.answer.both_bad and third.answer.ranks == (0, 0)
    # Back from the end to the last item, and another answer in place of it.
    page.locator("#done-back").click()
    page.wait_for_selector(".card")
    page.keyboard.press("t")
    page.keyboard.press("Enter")
    page.get_by_text("All done").wait_for()
    assert not study.of("ann")[2].answer.both_bad
    assert page.errors == []


def test_ranks_by_dragging_by_buttons_and_by_keyboard(browser: Any, studies: Any) -> None:
    study = studies("rank", 3)
    page = opened(browser, study.link("ann"), viewport={"width": 1280, "height": 900})
    texts = [shown(page, place) for place in range(3)]
    for chip, lane in ((2, 0), (0, 1), (1, 1)):
        page.locator(f'[data-chip="{chip}"]').drag_to(page.locator(f'[data-lane="{lane}"]'))
    page.locator('[data-reason="2"]').fill("it is the best")
    page.locator("#submit").click()
    answered(page, 1)
    for place, rank in enumerate(("3", "1", "2")):
        page.locator(".card").nth(place).get_by_role("button", name=rank, exact=True).click()
    again = [shown(page, place) for place in range(3)]
    page.locator("#submit").click()
    answered(page, 2)
    page.keyboard.press("a")
    for rank in "132":
        page.keyboard.press(rank)
    keyed = [shown(page, place) for place in range(3)]
    page.keyboard.press("Enter")
    page.get_by_text("All done").wait_for()
    said = [dict(zip([r.text for r in j.content.responses], j.answer.ranks, strict=True)) for j in study.of("ann")]
    assert said == [
        {texts[2]: 0, texts[0]: 1, texts[1]: 1},
        {again[1]: 0, again[2]: 1, again[0]: 2},
        {keyed[0]: 0, keyed[2]: 1, keyed[1]: 2},
    ]
    first = study.of("ann")[0]
    assert first.answer.reasons[[r.text for r in first.content.responses].index(texts[2])] == "it is the best"
    assert page.errors == []


def test_ratings_flags_and_skipping(browser: Any, studies: Any) -> None:
    study = studies("rate", 2)
    page = opened(browser, study.link("ann"), viewport={"width": 390, "height": 800}, has_touch=True)
    texts = [shown(page, place) for place in range(2)]
    page.locator(".card").nth(0).get_by_role("button", name="7", exact=True).tap()
    page.locator(".card").nth(1).get_by_role("button", name="2", exact=True).tap()
    page.locator(".card").nth(1).get_by_label("harmful").check()
    page.locator("#submit").tap()
    answered(page, 1)
    page.locator("#skip").click()
    page.get_by_label("The prompt makes no sense").check()
    page.get_by_role("button", name="Skip", exact=True).click()
    answered(page, 2)
    first, second = study.of("ann")
    assert dict(zip([r.text for r in first.content.responses], first.answer.ratings, strict=True)) == {
        texts[0]: 7, texts[1]: 2,
    }  # fmt: skip
    assert first.answer.flags[[r.text for r in first.content.responses].index(texts[1])] == ("harmful",)
    assert second.answer.skipped == "The prompt makes no sense" and not second.answer.ranks
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "the page is wider than a phone"


def test_a_killed_server_a_closed_tab_and_two_people(browser: Any, studies: Any) -> None:
    study = studies("pair", 2)
    ann, ben = opened(browser, study.link("ann")), opened(browser, study.link("ben"))
    ann.keyboard.press("a")
    ann.keyboard.press("Enter")
    answered(ann, 1)
    study.kill()
    ann.keyboard.press("b")
    wanted = shown(ann, 1)
    ann.keyboard.press("Enter")
    ann.get_by_text("cannot be reached").wait_for()
    # The tab is closed with an answer that the server never got, and opened again after the server is back.
    context = ann.context
    ann.close()
    study.start()
    later = context.new_page()
    later.goto(study.link("ann"))
    answered(later, 2)
    assert best(study.of("ann")[1]) == wanted
    # A draft survives a reload; what ben sees does not depend on ann.
    ben.keyboard.press("b")
    ben.reload()
    ben.wait_for_selector(".card.chosen")
    ben.keyboard.press("Enter")
    answered(ben, 1)
    assert len(study.of("ben")) == 1 and len(study.of("ann")) == 2


def test_ratings_and_flags_by_keyboard_and_a_long_text_that_is_to_be_read_first(browser: Any, studies: Any) -> None:
    study = studies("rate", 2, text="\n\n" + LONG, read_first=True)
    page = opened(browser, study.link("ann"), viewport={"width": 1280, "height": 700})
    page.keyboard.press("a")
    page.keyboard.press("6")
    page.keyboard.press("3")
    assert page.locator("#submit").is_disabled()
    for place in range(2):
        box = page.locator(".card > .text").nth(place)
        page.keyboard.press("ab"[place])
        page.keyboard.press("Tab")
        assert box.evaluate("box => document.activeElement === box")
        page.keyboard.press("End")
        page.wait_for_function(
            "box => box.scrollTop + box.clientHeight >= box.scrollHeight - 4", arg=box.element_handle()
        )
    for _ in range(8):  # behind the second text: seven ratings, then its flag
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    second = shown(page, 1)
    page.keyboard.press("Enter")
    answered(page, 1)
    (judgment,) = study.of("ann")
    place = [r.text for r in judgment.content.responses].index(second)
    assert judgment.answer.ratings[place] == 3 and judgment.answer.flags[place] == ("harmful",)
    assert page.errors == []


def test_nothing_that_others_wrote_runs(browser: Any, studies: Any) -> None:
    study = studies("pair", 2, text=EVIL, texts=EVIL)
    page = opened(browser, study.link(EVIL))
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.locator("#notes").fill(EVIL)
    page.keyboard.press("Escape")
    page.keyboard.press("a")
    page.keyboard.press("Enter")
    answered(page, 1)
    page.keyboard.press("u")
    page.wait_for_function("() => document.getElementById('notes').value !== ''")
    assert page.evaluate("window.ran") is None and page.errors == []
    assert page.locator("script").count() == 1 and page.locator("main img, main a").count() == 0
    assert "<b onclick" in page.locator("#flags-list").inner_text()


def test_two_tabs_without_a_server_lose_neither_answer(browser: Any, studies: Any) -> None:
    study = studies("pair", 2)
    one = opened(browser, study.link("ann"))
    one.keyboard.press("a")
    one.keyboard.press("Enter")
    answered(one, 1)
    other = one.context.new_page()
    other.goto(study.link("ann"))
    other.wait_for_selector(".card")
    other.keyboard.press("u")  # the first item again, while the other tab has the second
    other.get_by_text("changing an earlier answer").wait_for()
    study.kill()
    for page, key in ((one, "b"), (other, "t")):
        page.keyboard.press(key)
        page.keyboard.press("Enter")
        page.get_by_text("cannot be reached").wait_for()
    context = one.context
    one.close()
    other.close()
    study.start()
    later = context.new_page()
    later.goto(study.link("ann"))
    answered(later, 2)
    first, second = study.of("ann")
    assert first.answer.ranks == (0, 0) and second.answer.ranks != (0, 0)


@pytest.mark.parametrize(("mode", "responses"), [("pair", 2), ("rank", 4), ("rate", 2)])
def test_on_a_phone_everything_fits_and_a_finger_hits_it(browser: Any, studies: Any, mode: str, responses: int) -> None:
    study = studies(mode, responses, text="\n\n" + LONG)
    page = opened(browser, study.link("ann"), viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page.locator("#skip").tap()
    sizes = page.evaluate(
        "[...document.querySelectorAll('button, summary, .chip, label:has(input[type])')].filter((e) => e.offsetParent)"
        ".map((e) => [e.textContent, e.getBoundingClientRect().width, e.getBoundingClientRect().height])"
    )
    assert len(sizes) > 5 and [size for size in sizes if min(size[1:]) < 43.9] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
