"""Headless Chromium: open a page and return the result of a script."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# In an inner frame of the requested width, because the browser window may have a minimum width.
_OUTER = """<!doctype html><meta charset="utf-8"><body style="margin:0"><pre id="found"></pre>
<iframe id="page" style="border:0;width:{width}px;height:900px"></iframe><script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {{
  const inner = frame.contentWindow, page = frame.contentDocument;
  const found = (() => {{ {probe} }})();
  document.getElementById("found").textContent = "FOUND" + JSON.stringify(found) + "END";
}});
frame.srcdoc = {source};
</script>"""


def open_in_browser(
    page: str, folder: Path, *, width: int, probe: str, dark: bool = False
) -> tuple[Any, list[str]]:
    """Open a page in headless Chromium; return the probe's result and the console messages.

    Args:
        page: the HTML.
        folder: for the files this needs.
        width: of the view in pixels.
        probe: body of a function in JavaScript; knows the page's `inner` window and its document `page`.
        dark: whether the user asks for a dark scheme.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    outer = folder / "outer.html"
    # Inside a script element only `</` must not appear as it is.
    source = json.dumps(page).replace("</", "<\\/").replace("<!--", "<\\!--")
    outer.write_text(_OUTER.format(width=width, probe=probe, source=source), encoding="utf-8")
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={width + 40},1000",
            "--virtual-time-budget=2000",
            "--dump-dom",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search("FOUND(.*?)END", done.stdout, re.DOTALL)
    assert found, f"the probe said nothing: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])), console
