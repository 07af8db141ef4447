"""Open a report in headless Chromium, at a desk's width and a phone's, light and dark, and look for what is wrong.

    python scripts/check_report.py [RUN_FOLDER] [--screenshots FOLDER]

Fails (exit 1) on a console error, an exception, a request for anything but the file, a figure that was not drawn, or
a page wider than its window. Exit 4: Chromium is not installed. Speaks the DevTools protocol over a pipe (file
descriptors 3 and 4 of the browser), so it needs nothing but the standard library.
"""

import argparse
import base64
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WIDTHS = {"desk": 1280, "phone": 390}  # CSS pixels
_SCHEMES = ("light", "dark")
_PATIENCE = 60  # seconds for one answer
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# What is wider than the window outside of a scrolling container, and which figures plotly has not drawn.
_PROBE = """({
  page: [document.documentElement.scrollWidth, innerWidth],
  wide: [...document.querySelectorAll("body *")]
    .filter(node => !node.closest(".scroll, pre, svg") && node.getBoundingClientRect().right > innerWidth + 0.5)
    .map(node => node.tagName + "." + node.className).slice(0, 5),
  empty: [...document.querySelectorAll("[data-figure]")]
    .filter(node => !node.querySelector("svg .trace, svg .scatterlayer")).map(node => node.dataset.figure),
  height: Math.ceil(document.documentElement.getBoundingClientRect().height),
})"""


class Page:
    """One tab, driven over the browser's two pipes.

    Args:
        reader: file descriptor that the browser writes to.
        writer: file descriptor that the browser reads from.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._reader, self._writer = reader, writer
        self._buffer, self._count = b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that come meanwhile are kept.

        Raises:
            RuntimeError: the browser refuses the command, closes the pipe, or does not answer in time.
        """
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": parameters, **session}
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") != self._count:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, url: str) -> None:
        """Load a page and wait until it has loaded and had half a second to draw."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.evaluate("new Promise(done => setTimeout(done, 500))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value")

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reader], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._reader, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError(f"Chromium {'closed the pipe' if ready else f'said nothing for {_PATIENCE} s'}")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextmanager
def chromium(program: str) -> Iterator[Page]:
    """A browser with a fresh profile, gone afterwards."""
    browser_reads, writer = os.pipe()
    reader, browser_writes = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = os.posix_spawn(
            program,
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, browser_reads, 3),
                (os.POSIX_SPAWN_DUP2, browser_writes, 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
        )
        os.close(browser_reads)
        os.close(browser_writes)
        try:
            yield Page(reader, writer)
        finally:
            os.kill(process, signal.SIGTERM)
            os.waitpid(process, 0)
            os.close(reader)
            os.close(writer)


def check(page: Page, report: Path, width: int, scheme: str, picture: Path | None) -> list[str]:
    """Open the report at one width and colour scheme; returns what is wrong with it, in words."""
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    url = report.resolve().as_uri()
    page.open(url)
    found = page.evaluate(_PROBE)
    wrong = [text for event in page.events if (text := _complaint(event, url))]
    if found["page"][0] > found["page"][1]:
        wrong.append(f"the page is {found['page'][0]} px wide in a window of {found['page'][1]}")
    wrong += [f"{node} sticks out of the window" for node in found["wide"]]
    wrong += [f"figure {name} is not drawn" for name in found["empty"]]
    if picture:
        clip = {"x": 0, "y": 0, "width": width, "height": found["height"], "scale": 1}
        image = page.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(base64.b64decode(image))
    return wrong


def _complaint(event: dict[str, Any], url: str) -> str | None:
    method, details = event.get("method"), event.get("params", {})
    if method == "Runtime.exceptionThrown":
        exception = details["exceptionDetails"]
        return f"exception: {exception.get('exception', {}).get('description', exception['text'])}"
    if method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
        return f"console {details['type']}: {[part.get('value') for part in details['args']]}"
    if method == "Log.entryAdded" and details["entry"]["level"] == "error":
        return f"browser error: {details['entry']['text']}"
    if method == "Network.requestWillBeSent":
        requested = details["request"]["url"]
        if requested != url and not requested.startswith("data:"):
            return f"request for {requested}"
    return None


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/demo"), help="run folder with a report.html")
    parser.add_argument("--screenshots", type=Path, help="where to write one PNG per width and colour scheme")
    options = parser.parse_args()
    report = options.folder / "report.html"
    program = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if program is None:
        print("Chromium is not installed: apt-get install chromium", file=sys.stderr)
        return 4
    if not report.is_file():
        print(f"{report} does not exist: make it with `tnm-pipeline run`", file=sys.stderr)
        return 3
    failures = 0
    with chromium(program) as page:
        for name, width in _WIDTHS.items():
            for scheme in _SCHEMES:
                picture = options.screenshots / f"{name}-{scheme}.png" if options.screenshots else None
                wrong = check(page, report, width, scheme, picture)
                failures += len(wrong)
                print(f"{name} {width} px, {scheme}: {'; '.join(wrong) or 'ok'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
