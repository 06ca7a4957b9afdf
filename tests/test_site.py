"""The documentation site is built, with every warning an error, and looked at in headless Chromium.

Needs Sphinx, which `make docs-test` has in an environment of its own, and Debian's chromium and chromium-driver.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="make docs-test has Sphinx in an environment of its own")

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SIZES = {390: 844, 1280: 900}
SCHEMES = ("light", "dark")

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not (DOCS / "conf.py").is_file(), reason="needs the sources")]


def build(source: Path, out: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", str(source), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    built = build(DOCS, out)
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="make docs-test installs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
        yield chrome


def show(browser, width: int, scheme: str) -> None:
    """As a window of that width of somebody who prefers that scheme."""
    # A phone would zoom out until all that is too wide fits.
    metrics = {"width": width, "height": SIZES[width], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


LOOK = """
// Tables and code may scroll by themselves; what is around them may not.
const frames = [document.documentElement, document.querySelector(".content")];
const pictures = [...document.images], shown = pictures.filter(i => i.offsetParent !== null);
return {
    missing: pictures.filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src),
    of_light: shown.filter(i => i.classList.contains("only-light")).map(i => i.src),
    of_dark: shown.filter(i => i.classList.contains("only-dark")).map(i => i.src),
    too_wide: frames.filter(f => f.scrollWidth > f.clientWidth).map(f => f.className || f.tagName),
    elsewhere: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith(location.origin)),
    background: getComputedStyle(document.body).backgroundColor,
};
"""


def look(browser, url: str, scheme: str) -> tuple[dict, int]:
    """What is wrong with a page, and how many pictures it shows that have a twin for the other scheme."""
    browser.get_log("browser")  # what is in it is another page's
    browser.get(url)
    seen = browser.execute_script(LOOK)
    light = min(map(int, re.findall(r"\d+", seen.pop("background"))[:3])) > 128
    shown = {"light": seen.pop("of_light"), "dark": seen.pop("of_dark")}
    seen["scheme"] = light != (scheme == "light")
    seen["console"] = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    own = len(shown.pop(scheme))
    (seen["foreign"],) = shown.values()
    return {what: value for what, value in seen.items() if value}, own


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", SIZES)
def test_every_page(site, address, browser, width, scheme):
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    assert "reference.html" in pages and len(pages) > 20
    show(browser, width, scheme)
    looks = {page: look(browser, f"{address}/{page}", scheme) for page in pages}
    assert not {page: wrong for page, (wrong, _) in looks.items() if wrong}
    assert sum(own for _, own in looks.values()) >= 7


@pytest.mark.parametrize("width", SIZES)
def test_a_wrong_page_is_seen(site, address, browser, width):
    text = (site / "limits.html").read_text()

    def wrong(name: str, before: str, planted: str, scheme: str = "light") -> dict:
        (site / f"{name}-{width}.htm").write_text(text.replace(before, planted + before))
        show(browser, width, scheme)
        return look(browser, f"{address}/{name}-{width}.htm", scheme)[0]

    assert {*wrong("missing", "</article>", '<img src="none.png">')} == {"missing", "console"}
    assert {*wrong("wide", "</article>", '<div style="width: 2000px">wide</div>')} == {"too_wide"}
    assert {*wrong("console", "</article>", "<script>nothing.at.all()</script>")} == {"console"}
    dark = '<img class="only-dark" style="display: block !important" src="_static/icon.svg">'
    assert {*wrong("foreign", "</article>", dark)} == {"foreign"}
    other = '<img src="http://localhost:1/a.png">'
    assert "elsewhere" in wrong("elsewhere", "</article>", other)
    white = "<style>body { background: white !important }</style>"
    assert {*wrong("white", "</head>", white, "dark")} == {"scheme"}


def test_search(address, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    show(browser, 1280, "light")
    browser.get(f"{address}/search.html?q=from_torch")
    links = WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "ul.search li a"))
    assert any("reference.html#fusednorm.FusedBatchNorm1d.from_torch" in link.get_attribute("href") for link in links)


def test_what_the_build_refuses(tmp_path):
    """A public name without a place, links that lead nowhere, a picture that is not there, an example that raises."""
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    reference = tmp_path / "docs" / "reference.md"
    text = reference.read_text()
    reference.write_text(text.replace(".. autofunction:: fold\n", ""))
    assert reference.read_text() != text
    page = tmp_path / "docs" / "limits.md"
    more = "[a](nowhere.md) [b](why.md#nothing) ![c](pictures/none.svg)\n```{worked}\nassert False\n```\n"
    page.write_text(f"{page.read_text()}\n{more}")
    inventory = tmp_path / "objects.inv"
    inventory.write_bytes(
        b"# Sphinx inventory version 2\n# Project: torch\n# Version: 0\n# The rest is compressed with zlib.\n"
        + zlib.compress(b"torch.nn.BatchNorm1d py:class 1 generated/torch.nn.BatchNorm1d.html#$ -\n")
    )
    built = build(page.parent, tmp_path / "out", TORCH_INVENTORY=str(inventory))
    assert built.returncode != 0
    for said in (
        "lacks the public name fusednorm.fold",
        "nowhere.md",
        "'nothing'",
        "pictures/none.svg",
        "worked: AssertionError",
    ):
        assert said in built.stderr, built.stderr
    # torch's names lead to its documentation where an inventory of it is at hand.
    linked = "https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html#torch.nn.BatchNorm1d"
    assert linked in (tmp_path / "out" / "reference.html").read_text()
