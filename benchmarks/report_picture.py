"""Pictures of reports for the documentation: `python -m benchmarks.report_picture`.

Draws the report of the recorded quick start, or of other runs, with a headless Chromium at a fixed size.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from fastvit_engine.cli import main as fastvit
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

RESULTS = Path(__file__).parent / "results" / "quickstart"
_WIDTH = 1000  # pixels
_HEIGHT = 810  # down to the end of the first charts
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    "--force-device-scale-factor=1",
]


def draw(page: Path, out: Path, top: int, height: int) -> None:
    """Writes a PNG of `height` rows of a page, without the `top` first ones. Raises UserError if that fails."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise UserError("no Chromium: install the package 'chromium' of Debian or Ubuntu, and run this again")
    with tempfile.TemporaryDirectory(prefix="fastvit-picture-") as profile:
        picture = Path(profile) / "page.png"
        options = [f"--user-data-dir={profile}", f"--window-size={_WIDTH},{top + height}", f"--screenshot={picture}"]
        command = [chromium, *_FLAGS, *options, page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode != 0 or not picture.is_file():
            raise UserError(f"Chromium has drawn nothing (exit code {done.returncode}): {done.stderr[-500:].strip()}")
        with Image.open(picture) as image:
            image.crop((0, top, _WIDTH, top + height)).save(out, optimize=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report_picture", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="*", default=[str(RESULTS)], help="a run, or several to compare")
    parser.add_argument("--out", metavar="FILE.png", type=Path, default=RESULTS / "report.png", help="the picture")
    parser.add_argument("--height", metavar="PIXELS", type=int, default=_HEIGHT, help="of it (default: %(default)s)")
    parser.add_argument("--top", metavar="PIXELS", type=int, default=0, help="left out above (default: %(default)s)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fastvit-report-") as folder:
        page = Path(folder) / "page.html"
        if code := fastvit(["report", *args.runs, "--out", str(page)]):
            return code
        try:
            draw(page, args.out, args.top, args.height)
        except UserError as error:
            say(f"error: {error}", file=sys.stderr)
            return 2
    say(f"picture: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
