"""Take pictures of a report for docs/report.md: the page on a desktop and on a phone, and a case in the case browser.

Uses Chromium from $CHROMIUM, or chromium, chromium-browser or google-chrome on the PATH; nothing is downloaded.

Reads    RESULTS_DIR/report/index.html           written by scripts/report.sh
Writes   docs/report_desktop.png                 1280 pixels wide
         docs/report_phone.png                   390 pixels wide, at twice the resolution
         docs/report_case.png                    the case browser, 1280 pixels wide

    .venv/bin/python experiments/screenshots.py runs/demo_default/results/report/index.html
"""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from dynamicrag import stage
from dynamicrag.stage import UserError, log

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("page", help="index.html of a report")
    parser.add_argument("--output_dir", default="docs", help="folder of the pictures")
    parser.add_argument("--case", help="id of the case to show (default: one that systems disagree on)")
    return parser.parse_args(argv)


def find_chromium() -> str:
    """Return the path of the browser. Raises UserError if there is none."""
    if given := os.environ.get("CHROMIUM"):
        if not shutil.which(given):
            raise UserError(f"CHROMIUM={given}: no such program; correct the variable")
        return shutil.which(given)
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    raise UserError("CHROMIUM: no browser found; install one (for example with apt-get install chromium), or set this variable")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start a headless Chromium."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        try:
            yield started
        finally:
            started.close()


def open_page(started: Browser, path: str, width: int, height: int, scale: float = 1) -> Page:
    """Open the report in light mode, in a window of the given CSS pixels. `path` may end in #case-ID."""
    name, _, fragment = path.partition("#")
    page = started.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme="light")
    page.goto(Path(name).resolve().as_uri() + (f"#{fragment}" if fragment else ""))
    return page


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not Path(args.page).is_file():
        raise UserError(f"{args.page}: no such file; create it with bash scripts/report.sh RESULTS_DIR")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as started:
        open_page(started, args.page, 1280, 1500).screenshot(path=folder / "report_desktop.png")
        open_page(started, args.page, 390, 844, scale=2).screenshot(path=folder / "report_phone.png")
        page = open_page(started, f"{args.page}#case-{args.case}" if args.case else args.page, 1280, 1500)
        if page.locator("#case-detail").count() == 0:
            raise UserError(f"{args.page}: contains no cases; create it again without --cases 0")
        if not args.case:
            page.locator("#filter-disagree").check()
        page.mouse.move(0, 0)
        page.evaluate("document.getElementById('cases').scrollIntoView()")
        page.screenshot(path=folder / "report_case.png")
    log.info("the pictures are in %s", folder)


if __name__ == "__main__":
    stage.run(main)
