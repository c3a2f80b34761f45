"""Tests of the report page in a real Chromium.

They cover what a person sees, clicks and types, and what no text of a run may do to the page.
Screenshots to look at go to $RAYWARP_SCREENSHOTS, if it names a folder.
"""

import base64
import json
import os
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from tiny_run import copied

from raywarp.report.page import save_report
from raywarp.report.server import ReportServer
from raywarp.run.folder import Run
from raywarp.storage import sealed

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'><svg onload='window.hacked = 1'>",
    "javascript:window.hacked=1 \"'` ${window.hacked = 1} {{data}} <!-- &lt;b&gt;",
    "a\x00b\x07c\x1b[31md\x7fe\x9ff\ufeff",
    "טקסט בעברית ثم عربي 1 2 3",
    "evil \u202egnp.exe\u202c \u2066x\u2069 \u200f",
    "👩‍👩‍👧‍👦 🎬 🇺🇳 e\u0301 \U0001f3f3\ufe0f",
    "lone \ud800 surrogate \udfff",
    "line one\nline two\ttab\r\nline three",
    "x" * 3000,
)


NEXT_CHART = """
const waiting = [...document.querySelectorAll(".chart")].filter((element) => !element.chart.instance);
if (waiting.length) waiting[0].scrollIntoView();
return waiting.length;
"""  # noqa: E501


class Browser:
    """Chromium, driven by Selenium, on one report at a time; keeps what the page logs and asks
    for.
    """

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, page: Path | str, width: int = 1280, dark: bool = False) -> None:
        self.driver.get("about:blank")
        self.logged(), self.requests()  # of the page before
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)
        assert self.wait(lambda: self.texts("#settings")), self.logged()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        found: str = self.run("return document.querySelector(arguments[0]).textContent", selector)
        return found

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            selector,
        )
        return found

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def type(self, selector: str, text: str) -> None:
        field = self.driver.find_element("css selector", selector)
        field.clear()
        field.send_keys(text)

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        deadline = time.monotonic() + seconds
        while not (result := condition()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return result

    def scroll_through(self) -> None:
        """So that every chart comes into view, and draws itself."""
        assert self.wait(lambda: self.run(NEXT_CHART) == 0), "a chart did not draw itself"
        self.run("scrollTo(0, 0)")

    def logged(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        messages = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, name: str) -> None:
        folder = os.environ.get("RAYWARP_SCREENSHOTS")
        if not folder:
            return
        width, height = self.run(
            "return [document.documentElement.clientWidth, document.documentElement.scrollHeight]"
        )
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        reason = (
            "no chromium or no chromedriver in PATH: as root, ./cluster/local.sh browser installs"
            " them"
        )
        if os.environ.get("RAYWARP_TEST_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to have one as root
    for argument in (
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1300,1000",
        f"--user-data-dir={profile}",
        *sandbox,
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def report(tiny_finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("report") / "report.html"
    save_report([str(tiny_finished.folder)], str(page))
    return page


def test_everything_is_there_and_nothing_is_asked_of_the_network(
    browser: Browser, report: Path
) -> None:
    browser.open(report)
    browser.scroll_through()
    assert browser.texts("nav a") == [
        *(
            "Summary",
            "Front",
            "Texts",
            "Control",
            "Curves",
            "Training texts",
            "Geometry",
            "Time",
            "Faults",
            "Settings",
        )
    ]
    assert browser.run(
        "return [...document.querySelectorAll('nav a')].every((a) =>"
        " document.querySelector(a.hash))"
    )
    assert browser.text("#state") == "finished"
    assert len(browser.texts("#curves .chart svg")) == 11
    assert len(browser.texts("#geometry .chart svg")) == 2
    for selector in ("#front-chart svg path", "#control svg path", "#time svg path"):
        assert len(browser.texts(selector)) > 5, selector
    assert "of ceiling" in browser.texts("#points th")
    assert browser.text("#share").startswith("SLERP's front: ")
    shown = "return arguments[0].map((name) => document.querySelector('#front-chart').chart"
    names = browser.run(
        f"{shown}.instance.getOption().series.filter((s) => s.name === name).length)",
        ["ceiling", "best of n"],
    )
    assert names == [2, 1]  # line and band; points
    assert "raywarp" in browser.text("#versions")
    assert "warp.steps" in browser.text("#settings table")
    assert browser.logged() == []
    assert all(url.startswith(("file://", "data:")) for url in browser.requests())
    browser.screenshot("light")


def test_points_can_be_clicked_hovered_and_reached_by_keys(
    browser: Browser, report: Path, tiny_finished: Run
) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser.open(report)
    samples = tiny_finished.samples()
    chart = browser.driver.find_element("css selector", "#front-chart")
    assert browser.wait(
        lambda: browser.run("return document.querySelector('#front-chart').chart.instance !== null")
    )
    browser.run("arguments[0].scrollIntoView({block: 'center'})", chart)
    names = [point["name"] for point in tiny_finished.front()["points"]]
    assert browser.text("#point h3") == "Texts of η 0.5"  # the chosen one
    for point in tiny_finished.front()["points"]:
        # others of so short a run may lie on top of each other
        if point["name"] not in (
            "sft",
            "policy 1",
            "liti 0.5",
        ):
            continue
        place = (
            "return arguments[0].chart.instance.convertToPixel({xAxisIndex: 0, yAxisIndex: 0},"
            " [arguments[1], arguments[2]])"
        )
        x, y = browser.run(place, chart, point["kl"], point["reward"])
        centre = chart.size["width"] // 2, chart.size["height"] // 2
        mouse = ActionChains(browser.driver).move_to_element_with_offset(
            chart, round(x) - centre[0], round(y) - centre[1]
        )
        mouse.perform()
        assert browser.wait(lambda: "KL" in browser.text("#front-chart > div:last-of-type")), (
            "no tooltip"
        )
        mouse.click().perform()
        label = {"sft": "SFT", "liti 0.5": "η 0.5"}.get(point["name"], point["name"])
        assert browser.text("#point h3") == f"Texts of {label}"
        assert browser.texts("#point .after") == [
            sample[point["name"]] or "(empty)" for sample in samples
        ]
        assert (
            browser.run("return document.querySelector('#points tr.on button').dataset.point")
            == point["name"]
        )
    browser.run("arguments[0].focus()", chart)
    current = names.index(
        browser.run("return document.querySelector('#points tr.on button').dataset.point")
    )
    chart.send_keys(Keys.ARROW_RIGHT)
    after = names[(current + 1) % len(names)]
    assert (
        browser.run("return document.querySelector('#points tr.on button').dataset.point") == after
    )
    button = browser.driver.find_element("css selector", "#points button[data-point=slerp]")
    button.send_keys(Keys.ENTER)
    assert browser.text("#point h3") == "Texts of SLERP"
    assert browser.logged() == []


def test_texts_are_searched_sorted_and_their_columns_chosen(
    browser: Browser, report: Path, tiny_finished: Run
) -> None:
    browser.open(report)
    rows = tiny_finished.samples()
    heads = browser.texts("#texts thead th")
    assert heads == ["prompt", "SFT", "policy 1", "policy 2", "η 0.5 (chosen)", "SLERP"]
    assert browser.text("#texts-count") == "2 of 2 prompts"
    browser.click("#texts thead button[data-sort='reward:sft']")
    assert (
        browser.run(
            "return document.querySelector('#texts th[aria-sort]').getAttribute('aria-sort')"
        )
        == "descending"
    )
    ranked = [row["prompt"] for row in sorted(rows, key=lambda row: -row["rewards"]["sft"])]
    assert browser.texts("#texts tbody th") == ranked
    browser.click("#texts thead button[data-sort='prompt']")
    assert browser.texts("#texts tbody th") == sorted(row["prompt"] for row in rows)
    browser.type("#texts-search", rows[0]["prompt"].upper())
    assert browser.texts("#texts tbody th") == [rows[0]["prompt"]]
    assert browser.text("#texts-count") == "1 of 1 matching prompts"
    assert browser.texts("#texts tbody mark") == [rows[0]["prompt"]]
    browser.type("#texts-search", "no such words anywhere")
    assert browser.texts("#texts tbody") == ["No prompt or text matches."]
    assert browser.logged() == []


def test_light_and_dark(browser: Browser, report: Path) -> None:
    seen = {}
    for dark in (False, True):
        browser.open(report, dark=dark)
        browser.scroll_through()
        seen[dark] = browser.run(COLOURS)
        browser.screenshot("dark" if dark else "light again")
    for name in ("ink", "page"):
        assert seen[False][name] != seen[True][name]
    assert luminance(seen[False]["page"]) > 0.8 > 0.2 > luminance(seen[True]["page"])
    for colours in seen.values():
        for ground in ("page", "card"):
            for ink in ("ink", "soft", "faint", "accent", "chart"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground, colours)
    browser.open(report)
    for theme, word in (("light", "Light"), ("dark", "Dark"), ("light", "Auto")):
        browser.click("#theme")
        assert word in browser.text("#theme")
        assert browser.run("return document.documentElement.dataset.theme") == theme
        assert browser.run(COLOURS)["page"] == seen[theme == "dark"]["page"]
    assert browser.logged() == []


COLOURS = """
const shown = (selector, property) => getComputedStyle(document.querySelector(selector))[property];
return {
  page: shown("body", "backgroundColor"), card: shown(".card", "backgroundColor"), ink: shown("body", "color"),
  soft: shown(".lead", "color"),
  faint: shown(".about", "color"), accent: shown("#points button", "color"), chart: shown("#front-chart svg text", "fill"),
};
"""  # noqa: E501


def luminance(colour: str) -> float:
    """Of rgb(r, g, b), as WCAG 2 has it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_phone_scrolls_down_and_never_sideways(browser: Browser, report: Path) -> None:
    browser.open(report, width=360)
    browser.scroll_through()
    assert browser.run("return document.documentElement.scrollWidth") == 360
    outside = """
    const scrolls = (element) => element.closest(".scroll, nav, .list, svg");
    const isWide = (element) => element.getBoundingClientRect().right > 361 && !scrolls(element);
    const wide = [...document.querySelectorAll("main *")].filter(isWide);
    return wide.map((element) => element.outerHTML.slice(0, 80));
    """
    assert browser.run(outside) == []
    assert (
        browser.run("return getComputedStyle(document.querySelector('#texts tbody td')).display")
        == "block"
    )
    assert browser.logged() == []
    browser.screenshot("phone")


def test_it_prints_with_every_chart(browser: Browser, report: Path) -> None:
    browser.open(report)
    printed = base64.b64decode(
        browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    )
    assert printed.startswith(b"%PDF")
    assert browser.run(
        "return [...document.querySelectorAll('.chart')].every((chart) => chart.querySelector('svg"
        " path'))"
    )
    assert not browser.run("return document.documentElement.classList.contains('printing')")
    assert browser.logged() == []
    if folder := os.environ.get("RAYWARP_SCREENSHOTS"):
        (Path(folder) / "print.pdf").write_bytes(printed)


def test_no_text_becomes_anything_but_text(
    browser: Browser, tiny_finished: Run, tmp_path: Path
) -> None:
    """HTML, control characters, marks that turn the direction of writing, and emoji; as prompts,
    texts, messages, names and settings.
    """
    folder = copied(tiny_finished, tmp_path / "run")
    names = [point["name"] for point in tiny_finished.front()["points"]]
    rows = [
        {"prompt": text, **dict.fromkeys(names, text), "rewards": dict.fromkeys(names, 1.0)}
        for text in HOSTILE
    ]
    sealed.write_json(folder / "samples.json", rows)
    for text in HOSTILE:
        event = dict.fromkeys(("time", "event", "what", "cause", "message", "policy"), text)
        sealed.append_jsonl(folder / "events.jsonl", event)
    model, out = json.dumps(HOSTILE[1]), json.dumps(HOSTILE[0])
    (folder / "config.yaml").write_text(
        f"model: {model}\nout: {out}\nwarp: {{steps: 6, policies: 2, iterations: 2}}\n"
    )
    page = tmp_path / "page.html"
    save_report([str(folder)], str(page))
    browser.open(page)
    browser.scroll_through()
    (
        browser.click("#texts .more button")
        if len(browser.texts("#texts tbody tr")) < len(HOSTILE)
        else None
    )
    shown = set(browser.texts("#texts tbody th"))
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[4], HOSTILE[6], HOSTILE[9]):
        assert text in shown
    assert "a␀b␇c␛[31md␡e⟨U+009F⟩f⟨U+FEFF⟩" in shown
    assert "evil ⟨U+202E⟩gnp.exe⟨U+202C⟩ ⟨U+2066⟩x⟨U+2069⟩ ⟨U+200F⟩" in shown
    assert "lone ⟨U+D800⟩ surrogate ⟨U+DFFF⟩" in shown
    assert "line one\nline two\ttab␍\nline three" in shown
    hebrew = (
        "return [...document.querySelectorAll('#texts tbody th .text')].find((e) =>"
        " e.textContent.startsWith('ט'))"
    )
    assert (
        browser.run(f"{hebrew.replace('return', 'return getComputedStyle(', 1)}).direction")
        == "rtl"
    )
    assert (
        browser.run(
            "return document.querySelectorAll('#texts tbody img, #texts tbody svg, main script,"
            " #faults img').length"
        )
        == 0
    )
    assert browser.run("return typeof window.hacked") == "undefined"
    assert browser.logged() == []
    browser.open(page, width=360)
    browser.scroll_through()
    assert browser.run("return document.documentElement.scrollWidth") == 360
    browser.screenshot("hostile phone")


def test_what_is_kept_and_what_is_extrapolated_is_shown(
    browser: Browser, report: Path, tiny_finished: Run, tmp_path: Path
) -> None:
    folder = copied(tiny_finished, tmp_path / "run")
    front = sealed.read_record(folder / "front.json")
    assert front
    for n, one in enumerate(front["points"]):
        one.update(retention=n / 10, retention_ci=0.05)
    far = {"name": "liti 1.5", "eta": 1.5, "extrapolated": True, "kl": one["kl"] + 1}
    front.update(points=[*front["points"], {**one, **far}], chosen="liti 1.5")
    sealed.write_record(folder / "front.json", front)
    save_report([str(folder)], str(tmp_path / "page.html"))
    browser.open(tmp_path / "page.html")
    browser.scroll_through()
    assert browser.texts("#points th")[-1] == "retention"
    last = browser.texts("#points tr:last-child td")
    assert last[0] == "η 1.5adapter/extrapolated"
    assert last[-1] == "0.50 ± 0.05"
    assert "retention 0.50 ± 0.05" in browser.text("#point .facts")
    assert "extrapolated" in browser.text("#point .facts")
    assert "extrapolated" in browser.text("#front-chart svg")  # in the legend
    assert "The chosen point has forgotten" in browser.text("#summary")
    cosine = json.loads((folder / "iterations/2/geometry.json").read_text())["merge"]["kl_cosine"]
    merges = browser.texts("#merges tbody tr:last-child td")
    assert merges[0] == "iteration 2"
    assert float(merges[1].split(" ±")[0].replace("−", "-")) == pytest.approx(cosine, abs=0.006)
    assert re.fullmatch(r"up to \d+ % of √KL", merges[2])
    assert browser.logged() == []
    browser.screenshot("extrapolated")
    browser.open(report)  # a run without texts and points beyond SLERP
    assert "retention" not in browser.texts("#points th")
    assert "extrapolated" not in browser.text("#points")
    assert "extrapolated" not in browser.text("#front-chart")


@pytest.mark.parametrize("names", [("good", "short"), ("good", "short", "kind")])
def test_the_preference_front_is_drawn_and_its_points_read(
    browser: Browser, tiny_finished: Run, tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = copied(tiny_finished, tmp_path / "run")
    front = sealed.read_record(folder / "front.json")
    assert front
    shares = [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.0, 1.0)]
    for n, one in enumerate(front["points"]):
        one.update(rewards=dict.fromkeys(names, 0.1 * n))
    merges = [
        {
            **one,
            "name": f"merge {n}",
            "eta": None,
            "weights": {"good": good, "short": short},
            "liti": 1 - n / 10,
            "kl": 2.0 + n,
            "rewards": {**dict.fromkeys(names, 0.0), "good": 1 + good, "short": 1 + short},
            "rewards_ci": dict.fromkeys(names, 0.1),
        }
        for n, (good, short) in enumerate(shares)
    ]
    told = [merge["name"] for merge in merges]
    volume = {"hypervolume": 2.25, "hypervolume_ci": [2.0, 2.5], "hypervolume_of": list(names)}
    front.update(points=[*front["points"], *merges], chosen="merge 1", preference_front=told)
    if len(names) > 2:
        front["directions"] = {"good": 1, "short": -1}
    sealed.write_record(folder / "front.json", front | volume)
    texts = json.loads((folder / "samples.json").read_text())
    for row in texts:
        row.update({name: f"text of {name}" for name in told})
    sealed.write_json(folder / "samples.json", texts)
    save_report([str(folder)], str(tmp_path / "page.html"))
    browser.open(tmp_path / "page.html")
    browser.scroll_through()
    drawn = browser.text("#preferences-chart svg")
    for word in ("1/0", "0.75/0.25", "0/1", "SFT", "policy 1", "KL, nats", "good", "short"):
        assert word in drawn
    assert "0.75" not in browser.text("#front-chart svg")
    assert "2.25 [2.00, 2.50]" in browser.text("#hypervolume")
    less = "More of good is better; less of short is better; no direction of kind is better."
    better = less if len(names) > 2 else "Upper right is better in both rewards."
    assert better in browser.text("#preferences")
    assert browser.text("#preferences-point h3") == "Texts of merge 1"
    assert {*browser.texts("#preferences-point .after")} == {"text of merge 1"}
    place = (
        "const chart = document.getElementById('preferences-chart').chart.instance;"
        "return chart.convertToPixel({xAxisIndex: 0, yAxisIndex: 0}, arguments[0])"
    )
    first, last = (browser.run(place, at) for at in ([2.0, 1.0], [1.0, 2.0]))
    assert first[0] > last[0]
    assert first[1] > last[1]  # pixels count downwards
    browser.click("#points button[data-point='merge 3']")
    assert browser.text("#preferences-point h3") == "Texts of merge 3"
    if len(names) > 2:
        browser.run(
            "const axis = document.getElementById('preferences-y'); axis.value = 'kind';"
            " axis.dispatchEvent(new Event('change'))"
        )
        assert "kind" in browser.text("#preferences-chart svg")
    else:
        assert not browser.texts("#preferences select")
    assert browser.logged() == []
    browser.screenshot(f"preferences-{len(names)}")


def test_a_large_run_travels_packed(browser: Browser, tiny_finished: Run, tmp_path: Path) -> None:
    """1,000 prompts, every one of which is found again."""
    folder = copied(tiny_finished, tmp_path / "run")
    names = [point["name"] for point in tiny_finished.front()["points"]]
    rows = [
        {"prompt": f"prompt {n}", **{name: f"{name} says {n * n} ו 🎬" * 8 for name in names}}
        for n in range(1000)
    ]
    sealed.write_json(folder / "samples.json", rows)
    save_report([str(folder)], str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").stat().st_size < 1.5e6
    browser.open(tmp_path / "page.html")
    assert browser.wait(lambda: browser.texts("#texts-count")) == ["12 of 1000 prompts"]
    browser.type("#texts-search", f"slerp says {777 * 777} ו 🎬")
    assert browser.texts("#texts tbody th") == ["prompt 777"]
    assert browser.logged() == []


def test_a_run_without_anything_but_its_configuration(
    browser: Browser, tiny_finished: Run, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_finished.folder / "config.yaml", tmp_path / "run")
    save_report([str(tmp_path / "run")])
    browser.open(tmp_path / "run" / "report.html")
    assert browser.text("#state") == "unknown"
    missing = browser.texts("#missing li")
    assert [text.partition(" ")[0] for text in missing[:3]] == [
        "metrics.jsonl",
        "front.json",
        "events.jsonl",
    ]
    assert browser.text("#front .empty") == "Nothing has been measured yet."
    assert browser.logged() == []


def test_several_runs_share_one_front(browser: Browser, tiny_finished: Run, tmp_path: Path) -> None:
    """As a sweep's do: all fronts in one picture, one run in full."""
    other = copied(tiny_finished, tmp_path / "other")
    front = tiny_finished.front()
    for point in front["points"]:
        point["reward"] -= 1
    sealed.write_record(
        other / "front.json", {name: value for name, value in front.items() if name != "sha256"}
    )
    save_report([str(tiny_finished.folder), str(other)], str(tmp_path / "both.html"))
    browser.open(tmp_path / "both.html")
    assert browser.wait(lambda: "other" in browser.text("#front-chart"))
    before = browser.texts("#points tbody tr")
    browser.run(
        "const s = document.querySelector('#run'); s.value = '1'; s.dispatchEvent(new"
        " Event('change'))"
    )
    assert browser.text("h1") == "other"
    assert browser.texts("#points tbody tr") != before
    assert browser.logged() == []


def test_served_it_follows_the_run(
    browser: Browser, tiny_finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raywarp.report.server.FRESH", 0.0)
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    shutil.copy(tiny_finished.folder / "config.yaml", run.folder)
    rows = tiny_finished.metrics()
    run.add_event("started")
    run.add_metrics(rows[0])
    server = ReportServer([str(run.folder)])
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        browser.open(server.address)
        assert browser.text("#state") == "under way"
        assert browser.text("#curves-note").startswith("1 steps in all")
        for row in rows[1:5]:
            run.add_metrics(row)
        assert browser.wait(lambda: browser.text("#curves-note").startswith("5 steps in all"))
        run.add_event("failed", message="the reward <b>broke</b>")
        assert browser.wait(lambda: browser.text("#state") == "failed")
        assert "the reward <b>broke</b>" in browser.text("#summary")
        assert browser.logged() == []
        assert all(url.startswith((server.address, "data:")) for url in browser.requests())
        answer = urllib.request.urlopen(f"{server.address}data.json")
        assert json.load(answer)["live"] is True
        for request, status in (
            (urllib.request.Request(f"{server.address}metrics.jsonl"), 404),
            (urllib.request.Request(server.address, headers={"Host": "evil.example:80"}), 403),
        ):
            with pytest.raises(HTTPError) as refusal:
                urllib.request.urlopen(request)
            assert refusal.value.code == status
        assert server.server_address[0] == "127.0.0.1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert browser.wait(lambda: browser.text("#state") == "the server has ended")
