"""The search page in a real browser (Chromium, headless) over the real HTTP application."""

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from askew import endpoint, facets, keys, messages, refusals
from askew.endpoint import Answer, Ask

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415478"
    "9c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)
COLOURS = ("red", "blue", "green")


def product(number: int) -> dict[str, Any]:
    fields = {"price": 5.5 + number, "colour": COLOURS[number % 3], "new": number % 2 == 0}
    return {"item_id": f"a/b {number}?", "title": f"Mug <b>{number}</b>", "fields": fields}


@dataclass
class Shop:
    """Thirty mugs, found in their order; what it was asked; and trouble, as it is told."""

    busy = False
    asks: list[Ask] = field(default_factory=list)
    answered: int = 2
    error: Exception | None = None
    candidate: messages.Candidate | None = None
    version: str = "3"

    @property
    def release(self) -> messages.ReleaseResponse:
        return messages.ReleaseResponse(
            model=messages.Served(name="shop", version=self.version), model_key="m", index_key="0123456789abcdef",
            items=30, shards=2, since="2026-11-26T00:00:00Z", held=["3", "2"], candidate=self.candidate,
        )  # fmt: skip

    async def search(self, ask: Ask) -> Answer:
        self.asks.append(ask)
        if self.error:
            raise self.error
        products = [one for one in map(product, range(30)) if self._passes(one, ask.where)]
        if ask.image_weight == 0 or ask.version == "2":
            products = products[3:]
        hits: list[dict[str, Any]] = [{**one, "score": 0.9 - n / 100} for n, one in enumerate(products[: ask.k])]
        if ask.explain or ask.image_weight is not None:
            told = {"text": 0.25, "image": 0.75, "fused": 0.6, "without_image": 0.5}
            hits = [{**hit, "explanation": told} for hit in hits]
        release = self.release.model_copy(
            update={"model": messages.Served(name="shop", version=ask.version or "3")}
        )
        return Answer(hits, self.answered, {"searching": 1.0}, release, (2 - self.answered) / 4)

    @staticmethod
    def _passes(one: dict[str, Any], where: Any) -> bool:
        def held(name: str, wanted: Any) -> bool:
            value = one["fields"][name]
            if isinstance(wanted, dict):
                return bool(wanted.get("gte", 0) <= value <= wanted.get("lte", 99))
            return value in wanted

        return all(held(*pair) for pair in (where or {}).items())

    async def facets(self, where: Any, limit: int) -> tuple[list[dict[str, Any]], messages.Release]:
        there = [one["fields"] for one in map(product, range(30)) if self._passes(one, where)]
        return facets.shown(facets.count([(_table(there), None)]), limit), self.release

    async def item(self, item_id: str) -> tuple[dict[str, Any], bytes | None]:
        if item_id == "a/b 1?":
            raise refusals.MissingError("no photo")
        return {**product(0), "item_id": item_id, "has_image": True}, PNG


def _table(fields: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    kinds = pa.struct([("price", pa.float64()), ("colour", pa.string()), ("new", pa.bool_())])
    return pa.table({"fields": pa.array(fields, kinds)})


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Shop, str]]:
    shop = Shop()
    with serving(shop) as url:
        yield shop, url


@contextmanager
def serving(shop: Shop, held: keys.Keys | None = None) -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    app: Any = endpoint.endpoint(shop, keys=held)  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def shop(served: tuple[Shop, str]) -> Shop:
    shop, _ = served
    shop.__init__()  # type: ignore[misc]
    return shop


@pytest.fixture
def page(shop: Shop, served: tuple[Shop, str], browser: Browser) -> Iterator[Page]:
    """The page, just opened; in the end nothing was asked of elsewhere, and no script failed."""
    yield from opened(browser, served[1])


def opened(browser: Browser, url: str, **how: Any) -> Iterator[Page]:
    context = browser.new_context(**how)
    page, asked, troubles = context.new_page(), list[str](), list[str]()
    page.set_default_timeout(10_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda line: troubles.append(line.text) if "Security" in line.text else None)
    page.goto(url)
    yield page
    context.close()
    assert {one.startswith((url, f"blob:{url}", "data:")) for one in asked} == {True}
    assert troubles == []


def typed(page: Page, query: str = "mug") -> None:
    page.get_by_role("searchbox").fill(query)
    expect(page.locator("article")).to_have_count(24)


def test_what_is_typed_is_found_with_photos_fields_and_what_the_scores_are_made_of(page: Page, shop: Shop) -> None:
    box = page.get_by_role("searchbox")
    box.press_sequentially("red mug", delay=10)
    first = page.locator("article").first
    expect(first.locator("h3")).to_have_text("Mug <b>0</b>")  # as text
    expect(first.locator(".price")).to_have_text("5.50")
    expect(first.locator(".fields li")).to_have_text(["red", "new"])
    expect(first.locator(".score b")).to_have_text("0.900")
    expect(first.locator(".parts")).to_contain_text("the photo adds 0.40")
    image = first.get_by_alt_text("Photo of Mug <b>0</b>")
    expect(image).to_have_js_property("naturalWidth", 1)
    expect(page.locator("article").nth(1).locator(".photo")).to_have_text("no photo")
    expect(page.locator("#said")).to_contain_text("24 products for “red mug”")
    assert [(ask.query, ask.explain) for ask in shop.asks[-2:]] == [("red mug", False), ("red mug", True)]
    assert len(shop.asks) < len("red mug")  # not at every letter


def test_filters_have_counts_and_narrow_the_results(page: Page, shop: Shop) -> None:
    typed(page)
    red = page.get_by_role("checkbox", name="red 10")
    red.check()
    expect(page.locator("article")).to_have_count(10)
    page.get_by_label("price to").fill("20")
    page.get_by_label("price to").press("Enter")
    expect(page.locator("article")).to_have_count(5)
    expect(page.get_by_role("checkbox", name="blue 5")).to_be_visible()  # as if no colour were chosen
    assert shop.asks[-1].where == {"colour": ["red"], "price": {"lte": 20}}
    page.reload()  # the address holds it all
    expect(page.locator("article")).to_have_count(5)
    page.get_by_role("button", name="clear all filters").click()
    expect(page.locator("article")).to_have_count(24)


def test_words_and_photo_are_weighed_by_the_slider_and_by_its_keys(page: Page, shop: Shop) -> None:
    typed(page)
    slider = page.get_by_label("Words or photo")
    slider.focus()
    slider.press("ArrowRight")
    expect(page.locator("#weighed")).to_have_text("text 40 %, photo 60 %")
    slider.press("Home")
    expect(page.locator("article h3").first).to_have_text("Mug <b>3</b>")
    assert shop.asks[-1].image_weight == 0
    page.get_by_role("button", name="back to fused").click()
    expect(page.locator("article h3").first).to_have_text("Mug <b>0</b>")
    assert shop.asks[-1].image_weight is None


def test_more_like_a_product(page: Page, shop: Shop) -> None:
    typed(page)
    page.get_by_role("button", name="more like Mug <b>2</b>").click()
    expect(page.locator("#said")).to_contain_text("like “Mug <b>2</b>”")
    assert shop.asks[-1].like == "a/b 2?"


def test_an_answer_without_a_shard_is_called_incomplete(page: Page, shop: Shop) -> None:
    shop.answered = 1
    typed(page)
    banner = page.locator("#banner")
    expect(banner).to_have_text(
        "These results are incomplete: 1 of 2 shards did not answer, which hold 25 % of the catalogue."
    )
    shop.answered = 2
    typed(page, "mugs")
    expect(banner).to_be_hidden()


def test_what_went_wrong_is_said_in_the_endpoints_words(page: Page, shop: Shop) -> None:
    shop.error = refusals.UnavailableError("no shard answered")
    page.get_by_role("searchbox").fill("mug")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("no shard answered. try again after the seconds in the header Retry-After")
    shop.error = None
    typed(page, "mugs")
    expect(alert).to_be_hidden()


def test_text_alone_and_another_version_stand_beside_the_live_one(page: Page, shop: Shop) -> None:
    typed(page)
    page.get_by_label("side by side").check()
    expect(page.locator(".panel")).to_have_count(2)
    expect(page.locator("#said")).to_contain_text("21 of 24 products for “mug” are on both sides")
    expect(page.locator(".panel").nth(0).locator("li.only")).to_have_count(3)
    page.get_by_label("What this side shows").nth(1).select_option("version 2, in memory")
    expect(page.locator(".panel").nth(1).locator(".told")).to_contain_text("version 2")
    assert {ask.version for ask in shop.asks[-4:]} == {"", "2"}


def test_the_badge_tells_the_release_and_what_becomes_of_the_next(page: Page, shop: Shop) -> None:
    badge = page.locator("#badge")
    expect(badge).to_have_text("shop version 3")
    badge.click()
    expect(page.locator("#about")).to_contain_text("0123456789ab")
    shop.candidate = messages.Candidate(version="4", state="refused", reasons=["recall: wanted .95; found .5"])
    expect(badge).to_have_text("shop version 3; version 4: refused", timeout=15_000)
    expect(page.locator("#about")).to_contain_text("refused: recall: wanted .95; found .5")
    page.keyboard.press("Escape")
    expect(page.locator("#about")).to_be_hidden()


def test_it_is_used_by_keys_alone(page: Page) -> None:
    page.locator("#badge").focus()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("mug")
    expect(page.locator("article")).to_have_count(24)
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id")
        )
    assert {"weight", "compare", "f-colour-red", "more like Mug <b>0</b>"} <= set(reached)


def test_where_a_key_is_wanted_the_page_asks_for_it_and_keeps_it_in_its_tab(
    shop: Shop, browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    key = keys.add(file, "shop", ["search"])
    with serving(shop, keys.Keys(file, print)) as url:
        for page in opened(browser, url):
            box, use = page.get_by_label("This endpoint wants a key"), page.get_by_role("button", name="use it")
            expect(box).to_be_visible()
            expect(page.locator("#badge")).to_have_text("the endpoint wants a key")
            assert Axe().run(page).violations_count == 0
            box.fill("askew_wrong")
            use.click()
            expect(page.get_by_role("alert")).to_contain_text("no such key")
            expect(box).to_be_visible()
            assert shop.asks == []

            box.fill(f" {key}\u00e9 ")
            use.click()
            expect(box).to_be_hidden()
            expect(page.locator("#badge")).to_have_text("shop version 3")
            typed(page)
            expect(page.get_by_role("alert")).to_be_hidden()
            image = page.locator("article").first.get_by_alt_text("Photo of Mug <b>0</b>")
            expect(image).to_have_js_property("naturalWidth", 1)
            assert str(image.get_attribute("src")).startswith("blob:")
            expect(page.locator("article").nth(1).locator(".photo")).to_have_text("no photo")

            page.reload()
            expect(page.locator("article")).to_have_count(24)
            assert page.evaluate("[localStorage.length, document.cookie, location.href]")[:2] == [0, ""]
            assert key not in page.url
            another = page.context.new_page()
            another.goto(url)
            expect(another.get_by_label("This endpoint wants a key")).to_be_visible()


@pytest.mark.parametrize(
    "how",
    [
        {"color_scheme": "light"}, {"color_scheme": "dark"},
        {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True},
    ],
    ids=["light", "dark", "phone"],
)  # fmt: skip
def test_axe_finds_nothing_to_mend_and_nothing_hangs_over(
    shop: Shop, served: tuple[Shop, str], browser: Browser, how: dict[str, Any]
) -> None:
    for page in opened(browser, served[1], **how):
        shop.answered = 1  # with a banner
        typed(page)
        expect(page.locator(".bars").first).to_be_visible()
        for two in (False, True):
            if two:
                page.get_by_label("side by side").check()
                expect(page.locator(".panel")).to_have_count(2)
            page.locator("#release").evaluate("it => it.open = true")
            found = Axe().run(page)
            assert found.response["passes"]
            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.locator("#release").evaluate("it => it.open = false")
