"""A real Chromium through the WebDriver protocol, for whoever looks at pages."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One window of a given width, in the light or the dark scheme."""

    def __init__(self, address: str, profile: Path, width: int, dark: bool):
        self.address, self.width = address, width
        options = {
            "args": [*QUIET, f"--user-data-dir={profile}", *(["--force-dark-mode"] if dark else [])],
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": 844, "pixelRatio": 1}},
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.address += "/session/" + self._call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _call(self, path: str, content: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if content is None else json.dumps(content).encode()
        address = self.address if path or "/session/" in self.address else f"{self.address}/session"
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(address + path, data, kind, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path | str) -> None:
        """Open a file or an address."""
        self._call("/url", {"url": page if isinstance(page, str) else page.absolute().as_uri()})

    def run(self, script: str) -> Any:
        return self._call("/execute/sync", {"script": script, "args": []})

    def list_complaints(self) -> list[str]:
        """List what the page wrote to the console, and what it failed to load."""
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._call("", method="DELETE")


@contextmanager
def open_browser(folder: Path, width: int, dark: bool = False) -> Iterator[Browser]:
    """Start a browser and end it afterwards. Skips the test where there is no Chromium."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("needs Chromium and its chromedriver (Debian: chromium, chromium-driver)")
    with (folder / "chromedriver.log").open("w") as log:
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        browser = Browser(f"http://127.0.0.1:{_read_port(process)}", folder / "profile", width, dark)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait()


def _read_port(process: subprocess.Popen[str]) -> int:
    """Read the port that it chose, which it prints once it listens."""
    deadline = time.monotonic() + 60
    assert process.stdout is not None
    for line in process.stdout:
        if "started successfully on port" in line:
            return int(line.rstrip(".\n").split()[-1])
        assert time.monotonic() < deadline, "chromedriver did not start"
    raise AssertionError("chromedriver ended")
