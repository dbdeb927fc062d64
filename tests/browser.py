"""A headless Chromium, driven over two pipes by its DevTools protocol; no port is opened and no package needed."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
]

CHROMIUM = shutil.which("chromium")

# Texts within a selector whose colour differs too little from what is behind them (WCAG 2.2, 1.4.3), also those that
# appear under the pointer alone, and lines of charts (1.4.11): [what, contrast].
_LOW_CONTRASTS = """((inside) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const channels = (colour) => {
    if (!known.has(colour)) {
      canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
  const luminance = (colour) => {
    const [x, y, z] = colour.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    if (!element) throw new Error("no background");
    const colour = channels(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, behind(element.parentElement));
  };
  const opacity = (element) => element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1;
  const contrast = (colour, element) => {
    const below = behind(element), [r, g, b, a] = channels(colour);
    const pair = [over([r, g, b, a * (opacity(element) || 1)], below), below].map(luminance);
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };
  const low = [];
  for (const element of document.querySelectorAll(`${inside} *`)) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    const isLine = element.matches("path.line:not(.raw), path.mark");
    if (!isLine && (!text || element.closest("title, script, style") || !element.checkVisibility())) continue;
    const style = getComputedStyle(element);
    const ratio = isLine ? contrast(style.stroke, element.closest("svg")) : contrast(style.color, element);
    if (ratio < (isLine ? 3 : 4.5)) low.push([`${element.getAttribute("class")}: ${text.slice(0, 40)}`, ratio]);
  }
  return low;
})"""


class Tab:
    """One page of the browser. `problems`: errors of scripts, what its policy has blocked, and all that it logs."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Sends a command and waits for its answer. RuntimeError if it fails."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path: Path, width: int, *, dark: bool = False, script: bool = True) -> None:
        """Opens a file in a window of this width, in a theme, with or without JavaScript."""
        self.problems.clear()
        self._loaded = False
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.show(width, dark=dark)
        self.call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._receive()

    def show(self, width: int, *, dark: bool = False) -> None:
        """Gives the window another width and theme, and leaves the page open."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression. RuntimeError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def scrolls_sideways(self, width: int) -> bool:
        """Whether the page is wider than its window of `width`."""
        return bool(self.evaluate("document.documentElement.scrollWidth") > width)

    def widest(self) -> str:
        """Tag, class and text of the innermost element that reaches furthest right, unless something scrolls it."""
        return str(
            self.evaluate(
                """(() => {
                  const apart = (at) => at !== document.body
                    && (getComputedStyle(at).position === "fixed" || scrolls(at.parentElement));
                  const scrolls = (at) => getComputedStyle(at).overflowX !== "visible" || apart(at);
                  const right = (element) => element.getBoundingClientRect().right;
                  const widest = [...document.body.querySelectorAll("*")].filter((element) => !apart(element))
                    .reduce((best, other) => right(other) >= right(best) ? other : best);
                  return `${widest.tagName} ${widest.className}: ${widest.textContent.trim().slice(0, 60)}`;
                })()"""
            )
        )

    def low_contrasts(self, inside: str) -> list[tuple[str, float]]:
        """Texts and lines of charts within a selector that WCAG AA finds too pale, with their contrasts."""
        return [(text, ratio) for text, ratio in self.evaluate(f"{_LOW_CONTRASTS}({json.dumps(inside)})")]

    def missing_pictures(self) -> list[str]:
        """The addresses of pictures that have not loaded."""
        found: list[str] = self.evaluate(
            "[...document.images].filter((image) => !image.naturalWidth).map((image) => image.src)"
        )
        return found

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")["data"])
        )

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            received = os.read(self._answers, 1 << 20)
            if not received:
                raise RuntimeError("Chromium has ended")
            self._buffer += received
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method = message.get("method")
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.problems.append(message["params"]["exceptionDetails"]["exception"]["description"])
        elif method == "Log.entryAdded":
            self.problems.append(message["params"]["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            said = " ".join(str(part.get("value", part)) for part in message["params"]["args"])
            self.problems.append(f"console.{message['params']['type']}: {said}")
        return message


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """A browser with a new profile, which ends with the block."""
    assert CHROMIUM is not None
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    # Chromium reads from descriptor 3 and writes to 4.
    shell = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
    process = subprocess.Popen(
        ["bash", "-c", shell, CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Tab(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        process.terminate()
        process.wait(20)
