"""The page in a real browser: Chromium drops the pictures, presses the buttons and sees the answers."""

import shutil

import pytest
from PIL import Image
from served_page import served_page
from synthetic_dataset import write_dataset
from tiny_checkpoint import save_tiny_checkpoint, stereo_pair

from stereovla.app.command import AppOptions

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# pictures of plotly's need WebGL, here in software
SWITCHES = ("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
PATIENCE_MS = 240_000


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    save_tiny_checkpoint(folder / "model", preset="demo")  # with pointers
    write_dataset(folder / "data", [4, 6], 2, split="validation", size=96)
    for name, view in zip(("left", "right"), stereo_pair(size=96), strict=True):
        Image.fromarray(view).save(folder / f"{name}.png")
    options = AppOptions(
        str(folder / "model"),
        dataset=[str(folder / "data")],
        world='{"preset": "easy", "image_size": 96}',
        execution_horizon=2,
        max_steps=4,
        run_code=True,
    )
    with served_page(options) as address:
        yield address, folder


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_visitor_uses_all_of_it(url):
    address, folder = url
    errors, outside = [], []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=list(SWITCHES))
        page = browser.new_page(viewport={"width": 1500, "height": 950})
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))

        def only_here(route):
            if route.request.url.startswith((address, "data:", "blob:")):
                route.continue_()
            else:
                outside.append(route.request.url)
                route.abort()

        page.route("**/*", only_here)
        page.goto(address)
        ask = page.get_by_role("button", name="Ask the model")
        ask.click()
        page.get_by_text("the left and the right view is missing: drop a picture there").wait_for()
        page.get_by_test_id("toast-close").click()

        files = page.locator("input[type=file]")
        for number, name in enumerate(("left", "right")):
            files.nth(number).set_input_files(str(folder / f"{name}.png"))
            page.locator(".view img").nth(number).wait_for()
        page.get_by_label("Instruction").fill("pick up the red cube")
        ask.click()
        page.get_by_text("ms for a chunk of 8 actions").wait_for()
        drawn = page.locator(".drawn img")
        drawn.nth(2).wait_for()
        sizes = [drawn.nth(number).evaluate("image => image.naturalWidth") for number in range(3)]
        assert sizes == [560, 560, 560]
        page.get_by_text("the chunk has no place in the picture").wait_for()
        page.locator(".js-plotly-plot canvas").first.wait_for()
        assert page.locator(".chunk").get_by_text("dpitch").count()

        page.get_by_role("tab", name="Dataset").click()
        page.get_by_label("Episode").fill("1")
        page.get_by_role("button", name="Take this frame and ask").click()
        page.get_by_text("tool now").wait_for()  # a calibration came with the frame

        page.get_by_role("tab", name="Simulator").click()
        page.get_by_role("button", name="New world").click()
        page.get_by_text("0.0 s, progress").wait_for()
        page.get_by_role("button", name="Step", exact=True).click()
        page.get_by_text("0.2 s, progress").wait_for()
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_text("failed").wait_for()
        left = page.locator(".view img").first.evaluate("image => image.naturalWidth")
        page.screenshot(path=folder / "page.png", full_page=True)  # to look at
        assert left == 96
        browser.close()
    assert not errors and not outside, (errors, outside)
