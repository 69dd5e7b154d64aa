"""Save a picture of a running run's page: python docs/make_screenshot.py http://127.0.0.1:8080 page.png"""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Error, sync_playwright

CHART_IS_DRAWN = """() => window.Bokeh?.documents[0]?.is_idle
    && Bokeh.documents[0].get_model_by_name("rounds").get_length() > 0"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Save a picture of a run's page, once its curve is drawn.")
    parser.add_argument("url", help="the run's link")
    parser.add_argument("out", type=Path, help="the picture to write, a .png")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, help="of the picture; without it, the whole page is on it")
    parser.add_argument("--dark", action="store_true", help="as readers with a dark system see it")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for the first round (default 60)")
    arguments = parser.parse_args()

    chromium = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if chromium is None:
        sys.exit("No Chromium found: install one first, for example with `apt-get install chromium`.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(
            viewport={"width": arguments.width, "height": arguments.height or 800},
            color_scheme="dark" if arguments.dark else "light",
            reduced_motion="reduce",
        )
        try:
            page.goto(arguments.url)
            page.wait_for_function(CHART_IS_DRAWN, timeout=arguments.timeout * 1000)
        except Error as error:
            sys.exit(f"No curve to see at {arguments.url}: {error.message.splitlines()[0]}")
        page.screenshot(path=arguments.out, full_page=arguments.height is None)
        browser.close()


if __name__ == "__main__":
    main()
