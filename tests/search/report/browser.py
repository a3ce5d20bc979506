"""A real browser, driven by the WebDriver protocol (W3C Recommendation, 2018) with nothing but the standard library."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


def why_not() -> str:
    """Why there is none; empty where there is."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed: apt-get install chromium chromium-driver" if absent else ""


class Browser:
    """One session."""

    def __init__(self, place: str) -> None:
        self._place = place
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
        wanted = {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._place + path, data=data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()[:2000]) from None

    def _do(self, method: str, path: str, body: Any = None) -> Any:
        return self._ask(method, f"/session/{self._session}{path}", body)

    def open(self, url: str) -> None:
        """Go to a page."""
        self._do("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page returns; a promise is waited for."""
        text = f"const done = arguments[arguments.length - 1]; Promise.resolve((() => {{ {script} }})()).then(done);"
        return self._do("POST", "/execute/async", {"script": text, "args": list(arguments)})

    def wait(self, condition: str) -> None:
        """Until an expression in the page is true."""
        self._do("POST", "/timeouts", {"script": 90_000})
        look = f"const look = () => ({condition}) ? yes(true) : setTimeout(look, 50); look();"
        self.run(f"return new Promise((yes) => {{ {look} }});")

    def move_to(self, x: float, y: float, *, click: bool = False) -> None:
        """Bring the mouse to a place of the window."""
        steps: list[dict[str, Any]] = [{"type": "pointerMove", "duration": 50, "x": round(x), "y": round(y)}]
        if click:
            steps += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._do("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": steps}]})

    def press(self, key: str) -> None:
        """One key."""
        steps = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._do("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol: another screen, the dark, paper."""
        return self._do("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What the console ("browser") or the network ("performance") had to say since it was last asked."""
        found: list[dict[str, Any]] = self._do("POST", "/se/log", {"type": kind})
        return found

    def close(self) -> None:
        """End the session."""
        self._do("DELETE", "")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        port = next(
            line.rsplit(" ", 1)[1].strip(" .\n") for line in process.stdout if "started successfully on port" in line
        )
        found = Browser(f"http://127.0.0.1:{port}")
        try:
            yield found
        finally:
            found.close()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def visited(chromium: Browser, url: str) -> dict[str, Any]:
    """Go to a page of `nas report` as a reader does: it is drawn, and the front's first network pointed at and chosen.

    Returns:
        "charts" drawn, "points" of the front's chart, "hover" (its text), "copied" (what the click copied), "errors"
        of the console, and "remote", the addresses that were asked for and are no file's.
    """
    for kind in ("browser", "performance"):
        chromium.log(kind)  # of the page before
    chromium.open(url)
    chromium.wait("document.body.dataset.drawn")
    place = chromium.run(
        "document.getElementById('chart-front').scrollIntoView();"
        "const points = [...document.querySelectorAll('#chart-front .scatterlayer .trace')].at(-1)"
        ".querySelectorAll('.point'); const box = points[0].getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2];"
    )
    chromium.move_to(*place)
    chromium.wait("document.querySelector('#chart-front .hoverlayer .hovertext')")
    hover = chromium.run("return document.querySelector('#chart-front .hoverlayer').textContent;")
    chromium.move_to(*place, click=True)
    chromium.wait("document.body.dataset.copied")
    messages = [json.loads(entry["message"])["message"] for entry in chromium.log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {
        "charts": int(chromium.run("return document.body.dataset.drawn;")),
        "points": chromium.run("return document.querySelectorAll('#chart-front .point').length;"),
        "hover": hover,
        "copied": chromium.run("return document.body.dataset.copied;"),
        "errors": [entry["message"] for entry in chromium.log("browser") if entry["level"] == "SEVERE"],
        "remote": [one for one in asked if one.partition(":")[0] not in ("file", "data", "blob")],
    }
