"""The report in a browser: every chart is drawn, nothing is fetched, and people who use a mouse, a keyboard or neither can read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import frostline
from frostline.testing import image_folder, toy_job

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver, from apt-get")

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900"),
)
HOSTILE = ('"><img src=x onerror=alert(1)>', "<script>alert(2)<!--", "plain")
MARKS = "path, line, rect, text"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a real search over images whose classes have names that would be tags."""
    root = tmp_path_factory.mktemp("results")
    rates = {
        "train.head_lr": {"low": 1e-3, "high": 1e-1, "log": True},
        "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    }
    arms = {
        "freeze": {"strategy": "freeze_depth", "space": {"freeze.depth": "all", "head.hidden": [0, 16], **rates}},
        "full": {"strategy": "full", "space": rates},
    }
    job = toy_job(
        root / "toy",
        ["search.trials=20", "train.epochs=2"],
        data={"path": str(image_folder(root / "images", HOSTILE, per_class=30)), "image_size": 16},
        arms=arms,
        confirm={"seeds": 2, "finalists": "arms"},
    )
    return frostline.search(job, inline=True) / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    """The report, opened anew in the light and drawn."""
    scheme(browser, "light")
    opened(browser, report)
    return browser


def scheme(browser: Any, name: str, media: str = "") -> None:
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def opened(browser: Any, path: Path) -> None:
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what came before
    browser.get(path.as_uri())
    until(browser, lambda driver: driver.execute_script("return document.documentElement.dataset.drawn"))


def until(browser: Any, holds: Callable[[Any], Any]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(holds)


def rows(browser: Any) -> int:
    return browser.execute_script("return document.querySelectorAll('#trials-table tbody tr').length")


def drawn_lines(browser: Any) -> int:
    """Of the trials kept: the coloured ones."""
    return browser.execute_script(
        "return document.querySelectorAll(\"#chart-parallel path[stroke^='var(--ramp']\").length"
    )


def test_it_is_drawn_without_an_error_and_without_a_request(page: Any, report: Path) -> None:
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert report.as_uri() in asked
    assert [url for url in asked if url != report.as_uri() and not url.startswith("data:")] == []


def test_every_chart_has_marks_and_a_name(page: Any) -> None:
    charts = page.execute_script(
        "return [...document.querySelectorAll('[data-chart]')].map((each) => [each.dataset.chart, "
        f"each.querySelectorAll('svg .role-mark :is({MARKS})').length, each.getAttribute('aria-label')])"
    )
    assert len(charts) >= 12
    for name, marks, label in charts:
        assert marks > 0, name
        assert label, name


def test_names_that_would_be_tags_are_text(page: Any) -> None:
    assert page.execute_script("return document.querySelectorAll('img[src=x], [onerror]').length") == 0
    assert HOSTILE[0] in page.execute_script("return document.querySelector('#mistakes').textContent")
    assert page.execute_script(
        "return [...document.querySelectorAll('.pictures img')].every((each) => each.naturalWidth > 0)"
    )


def test_a_script_that_got_in_would_not_run(page: Any) -> None:
    page.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.ran = true'; document.body.append(script)"
    )
    assert page.execute_script("return window.ran") is None
    assert "Content Security Policy" in page.get_log("browser")[0]["message"]


def test_a_rectangle_on_the_parallel_coordinates_picks_trials(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    everything = rows(page)
    assert drawn_lines(page) == everything
    plot = page.find_element("css selector", "#chart-parallel svg")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    ticks = page.execute_script(
        "return [...document.querySelectorAll('#chart-parallel text')].filter((each) => each.textContent === 'full')"
        ".map((each) => [each.getBoundingClientRect().x, each.getBoundingClientRect().y])"
    )
    x, y = ticks[-1]
    box = page.execute_script(
        "const box = arguments[0].getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]", plot
    )
    from_centre = round(x - box[0]), round(y - box[1])
    chain = (
        ActionChains(page).move_to_element_with_offset(plot, from_centre[0] - 25, from_centre[1] - 12).click_and_hold()
    )
    chain.move_by_offset(20, 12).move_by_offset(20, 14).release().perform()
    until(page, lambda driver: 0 < rows(driver) < everything)
    kept = rows(page)
    until(page, lambda driver: drawn_lines(driver) == kept)
    assert page.execute_script("return document.getElementById('match').textContent").startswith(
        f"{kept} of {everything} trials"
    )
    arms = page.execute_script(
        "return [...document.querySelectorAll('#trials-table tbody tr')].map((row) => row.cells[2].textContent)"
    )
    assert set(arms) == {"full"}
    page.find_element("id", "all-trials").send_keys(Keys.ENTER)
    assert rows(page) == everything
    until(page, lambda driver: drawn_lines(driver) == everything)


def test_fields_do_what_the_rectangle_does(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    everything = rows(page)
    first = page.find_element("css selector", '[data-axis="0"] input')
    first.send_keys(Keys.SPACE)  # a checkbox: the first arm
    without = rows(page)
    assert 0 < without < everything
    score = page.find_elements("css selector", ".filters fieldset:last-child input")
    score[0].send_keys("2")  # no accuracy is that high
    assert rows(page) == 0
    assert page.execute_script("return document.getElementById('match').textContent").startswith("0 of")
    score[0].send_keys(Keys.BACKSPACE)
    assert rows(page) == without


def test_the_keyboard_reaches_every_section(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    sections = page.execute_script("return [...document.querySelectorAll('main section')].map((each) => each.id)")
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert page.execute_script("return document.activeElement.className") == "skip"
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert page.execute_script("return document.activeElement.id") == sections[0]
    reached = set()
    for _ in range(400):
        ActionChains(page).send_keys(Keys.TAB).perform()
        found = page.execute_script(
            "const at = document.activeElement; return [at.closest('section')?.id, at.tagName, at.matches(':focus-visible')]"
        )
        if found[1] == "BODY":
            break
        assert found[2], found
        reached.add(found[0])
    assert set(sections[1:]) <= reached


def test_every_table_opens(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    for summary in page.find_elements("css selector", "summary"):
        summary.send_keys(Keys.ENTER)
    closed = page.execute_script("return document.querySelectorAll('details:not([open])').length")
    assert closed == 0
    assert page.execute_script(
        "return [...document.querySelectorAll('details table')].every((each) => each.offsetHeight > 0)"
    )


def test_dark_and_print_have_colours_of_their_own(browser: Any, report: Path) -> None:
    shots, colours = [], []
    for name, media in (("light", ""), ("dark", ""), ("dark", "print")):
        scheme(browser, name, media)
        opened(browser, report)
        shots.append(browser.get_screenshot_as_png())
        colours.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    scheme(browser, "light")
    assert len(set(shots)) == 3
    assert colours == ["rgb(244, 246, 248)", "rgb(14, 19, 25)", "rgb(255, 255, 255)"]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_not_wider_than_the_screen(browser: Any, report: Path, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened(browser, report)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
