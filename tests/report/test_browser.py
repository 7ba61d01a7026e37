"""The page in a real browser. Needs the extra `browser` and Chromium with its driver."""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_softprune.report.page import report_page
from support.results import RESULTS, full_result

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra `browser`")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs Chromium and chromedriver")

PHONE, DESKTOP = 390, 1280
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER, env={**os.environ, "SE_OFFLINE": "true"})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A folder served on this machine: its address, the folder, and the paths asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_: object) -> None:
            asked.append(self.path)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path, asked
    server.shutdown()
    thread.join()
    server.server_close()


def open_page(browser: Any, path: Path, width: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser")
    browser.get(path.as_uri())


def write(path: Path, name: str = "ordinary") -> Path:
    path.write_text(report_page(RESULTS[name]), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_nothing_is_wider_than_the_screen_and_nothing_fails(
    browser: Any, tmp_path: Path, name: str, width: int
) -> None:
    open_page(browser, write(tmp_path / "report.html", name), width)

    wide, screen, high = browser.execute_script(
        "const page = document.scrollingElement; return [page.scrollWidth, page.clientWidth, page.scrollHeight]"
    )

    assert browser.get_log("browser") == []
    assert wide <= screen
    assert high < 9_000  # long tables scroll by themselves


def test_the_page_asks_its_server_for_itself_alone(browser: Any, pages: tuple[str, Path, list[str]]) -> None:
    address, folder, asked = pages
    write(folder / "report.html")

    browser.get_log("performance")
    browser.get(f"{address}/report.html")
    requests = [
        entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]

    assert asked == ["/report.html"]
    assert len([message for message in requests if '"url":"http' in message]) == 1
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") in (
        [],
        ["data:,"],
    )


def column(browser: Any, name: str) -> tuple[list[str], str | None]:
    """The cells of a column of the trials, and how it is sorted."""
    script = """
        const table = document.querySelector("table.sortable");
        const heads = [...table.tHead.rows[0].cells];
        const place = heads.findIndex((head) => head.textContent === arguments[0]);
        const cells = [...table.tBodies[0].rows].map((row) => row.cells[place].textContent);
        return [cells, heads[place].getAttribute("aria-sort")];
    """
    cells, order = browser.execute_script(script, name)
    return cells, order


def button(browser: Any, name: str) -> Any:
    return browser.find_element("xpath", f"//table//button[text()={name!r}]")


def test_a_click_sorts_and_another_one_turns_it_around(browser: Any, tmp_path: Path) -> None:
    open_page(browser, write(tmp_path / "report.html"), DESKTOP)
    assert column(browser, "trial") == (["0", "1", "2", "3"], "ascending")

    button(browser, "score").click()
    assert column(browser, "score") == (["19.5", "19.7", "19.9", "nan"], "ascending")
    assert column(browser, "trial") == (["2", "1", "0", "3"], None)

    button(browser, "score").click()
    assert column(browser, "score") == (["19.9", "19.7", "19.5", "nan"], "descending")  # what is missing stays last

    button(browser, "val_loss").click()
    assert column(browser, "val_loss") == (["0.111", "0.123", "inf", ""], "ascending")

    button(browser, "feasible").click()
    assert column(browser, "feasible") == (["no", "no", "yes", "yes"], "ascending")


@pytest.mark.parametrize("key", ["\ue007", " "], ids=["enter", "space"])
def test_the_keyboard_sorts_too(browser: Any, tmp_path: Path, key: str) -> None:
    open_page(browser, write(tmp_path / "report.html"), DESKTOP)

    button(browser, "sparsity").send_keys(key)

    assert column(browser, "sparsity") == (["0.35", "0.69", "0.7", "0.8"], "ascending")


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_page_follows_the_systems_colour_scheme(browser: Any, tmp_path: Path, scheme: str, dark: bool) -> None:
    open_page(browser, write(tmp_path / "report.html"), DESKTOP, scheme)

    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    red = int(colour.removeprefix("rgb(").split(",")[0])
    assert (red < 128) == dark


def test_a_script_in_a_name_does_not_run(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    # Even if a name were not escaped: the policy knows the page's own script alone.
    text = report_page(full_result()).replace("<main>", "<main><script>document.title = 'run'</script>")
    path.write_text(text, encoding="utf-8")

    open_page(browser, path, DESKTOP)

    assert browser.title == "SoftPruning, epoch 4"
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]
