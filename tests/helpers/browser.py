"""Drive a headless Chromium over the WebDriver protocol, and record its network requests."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

_OPTIONS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run "
    "disable-background-networking disable-component-update disable-sync "
    "hide-scrollbars disable-dev-shm-usage"
)


def missing() -> str:
    """Return what is not installed, "" if a browser is available."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"{' and '.join(names)} missing: apt-get install chromium chromium-driver" if names else ""
    )


class Browser:
    """Hold a session with a fresh profile, in which no host name is resolved."""

    def __init__(
        self, profile: Path, *, dark: bool = False, width: int = 1200, height: int = 900
    ) -> None:
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._driver.stdout is not None
        port = next(
            match[1]
            for line in self._driver.stdout
            if (match := re.search(r"started successfully on port (\d+)", line))
        )
        self._base = f"http://127.0.0.1:{port}/session"
        words = [f"--{word}" for word in _OPTIONS.split()] + [
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ]
        words += [
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        ]
        capabilities = {
            "goog:chromeOptions": {"args": words},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        try:
            self._base += (
                "/" + self._ask("", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
            )
        except BaseException:
            self._driver.kill()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self._base, method="DELETE"), timeout=30
            ):
                pass
        finally:
            self._driver.terminate()
            self._driver.wait()
            if self._driver.stdout is not None:
                self._driver.stdout.close()

    def _ask(self, path: str, content: dict[str, Any] | None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self._base + path, data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        """Load a page and wait for it."""
        self._ask("/url", {"url": url})

    def run(self, script: str) -> Any:
        """Run a script in the page and return its value."""
        return self._ask("/execute/sync", {"script": script, "args": []})

    def evaluate_all(self, selector: str, expression: str) -> list[Any]:
        """Return the value of an expression of `e` for each element."""
        return list(
            self.run(
                f"return [...document.querySelectorAll({json.dumps(selector)})]"
                f".map(e => {expression})"
            )
        )

    def click(self, selector: str, index: int = 0) -> None:
        """Click on an element."""
        elements = self._ask("/elements", {"using": "css selector", "value": selector})
        (identifier,) = elements[index].values()
        self._ask(f"/element/{identifier}/click", {})

    def picture(self) -> bytes:
        """Return a screenshot as PNG."""
        return base64.b64decode(self._ask("/screenshot", None))

    def messages(self) -> list[str]:
        """Return errors and warnings of the console since the last call."""
        entries = self._ask("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Return the requested addresses since the last call, without the browser's own pages."""
        events = [
            json.loads(entry["message"])["message"]
            for entry in self._ask("/se/log", {"type": "performance"})
        ]
        addresses = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in addresses if not address.startswith(("chrome", "data:"))]
