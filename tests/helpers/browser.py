"""A headless Chromium, driven over WebDriver's protocol: pages as a reader has them, with what they ask the network for."""

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
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync "
    "hide-scrollbars disable-dev-shm-usage"
)


def missing() -> str:
    """What is not installed; "" where a browser is there."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"{' and '.join(names)} missing: apt-get install chromium chromium-driver" if names else ""
    )


class Browser:
    """A session with a fresh profile; no name is resolved."""

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
            found[1]
            for line in self._driver.stdout
            if (found := re.search(r"started successfully on port (\d+)", line))
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
        """What a script in the page returns."""
        return self._ask("/execute/sync", {"script": script, "args": []})

    def each(self, selector: str, expression: str) -> list[Any]:
        """What an expression of `e` is for each element."""
        return list(
            self.run(
                f"return [...document.querySelectorAll({json.dumps(selector)})].map(e => {expression})"
            )
        )

    def click(self, selector: str, index: int = 0) -> None:
        """On the element, as a reader does."""
        (name,) = (
            found := self._ask("/elements", {"using": "css selector", "value": selector})[index]
        )
        self._ask(f"/element/{found[name]}/click", {})

    def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self._ask("/screenshot", None))

    def messages(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        found = self._ask("/se/log", {"type": "browser"})
        return [entry["message"] for entry in found if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call; not the browser's own pages, such as that of a new tab."""
        events = [
            json.loads(entry["message"])["message"]
            for entry in self._ask("/se/log", {"type": "performance"})
        ]
        found = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in found if not address.startswith(("chrome", "data:"))]
