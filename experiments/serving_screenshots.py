"""Take pictures of the server's page for docs/serving.md: a question, its answer and its documents, on a desktop and on a phone.

Uses the browser of experiments/screenshots.py. The server must be running, with a corpus (docs/serving.md has the command).

Reads    URL                                     the address of the server
Writes   docs/serving_desktop.png                1280 pixels wide
         docs/serving_phone.png                  390 pixels wide, at twice the resolution

    .venv/bin/python experiments/serving_screenshots.py http://127.0.0.1:8000 --question "What is the capital of France?"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import screenshots
from playwright.sync_api import Error, expect

from dynamicrag import stage
from dynamicrag.stage import UserError, log

SIZES = {"desktop": (1280, 1000, 1), "phone": (390, 844, 2)}  # width, height, scale
ANSWER_MS = 120_000


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("url", help="address of a running server")
    parser.add_argument("--question", default="What is the capital of France?", help="the question that is asked")
    parser.add_argument("--output_dir", default="docs", help="folder of the pictures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with screenshots.browser() as started:
        for name, (width, height, scale) in SIZES.items():
            page = started.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme="light")
            try:
                page.goto(args.url)
            except Error as error:
                raise UserError(f"{args.url}: no page there ({error.message.splitlines()[0]}); start serve.py first") from error
            page.get_by_label("Question").fill(args.question)
            page.get_by_role("button", name="Ask").click()
            expect(page.get_by_role("status")).to_contain_text("complete", timeout=ANSWER_MS)
            page.evaluate("document.activeElement.blur()")
            page.screenshot(path=folder / f"serving_{name}.png")
    log.info("the pictures are in %s", folder)


if __name__ == "__main__":
    stage.run(main)
