"""The report's page in a real browser without a network: no complaint, every figure drawn, both schemes, two widths."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from student.evaluation.report import write_report
from tests.fixtures.toy_run import load_toy
from tests.student.evaluation.test_report import collected, finished

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DARK = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]


def browse(*options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",  # no network: every name is unknown
        "--enable-logging=stderr",
    ]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; distributions have it as the package chromium")
def test_the_page_is_drawn_without_a_complaint(tmp_path: Path) -> None:
    config = load_toy(tmp_path)
    speed = {"tokens_per_s": 25.0, "baseline_tokens_per_s": 20.0, "speedup": 1.25, "acceptance_length": 1.5}
    finished(config, **speed, latency=speed | {"llada_alone": speed})
    collected(config)
    write_report(config)
    page = (config.report_dir / "index.html").absolute().as_uri()
    paper = {}
    for width in (420, 1200):
        for scheme, options in (("light", []), ("dark", DARK)):
            file = tmp_path / f"{width}-{scheme}.png"
            done = browse(f"--window-size={width},2400", f"--screenshot={file}", *options, page)
            assert "CONSOLE" not in done.stderr
            pixels = plt.imread(file)[..., :3]
            paper[width, scheme] = pixels[2, 2].mean()
            # Ink of some kind in every tenth of the page's upper half, and none beside the page's margin.
            bands = [pixels[top : top + 120] for top in range(0, 1200, 120)]
            assert all(band.std() > 0.01 for band in bands)
            assert pixels[:, -8:].std(axis=(0, 1)).max() < 0.01, "something is cut off at the right"
    assert paper[420, "light"] == paper[1200, "light"] > 0.9
    assert paper[420, "dark"] == paper[1200, "dark"] < 0.2
    # Every figure has a size in the laid-out page.
    script = (
        "document.title = [...document.querySelectorAll('figure svg')].map(s => Math.round(s.getBoundingClientRect()"
        ".width)).join(' ') + '|' + document.documentElement.scrollWidth"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(
        (config.report_dir / "index.html").read_text().replace("</body>", f"<script>{script}</script></body>")
    )
    title = re.search(r"<title>(.*?)</title>", browse("--window-size=500,900", "--dump-dom", probe.as_uri()).stdout)
    assert title is not None
    widths, page_width = title[1].split("|")
    assert len(widths.split()) == 7
    assert min(map(int, widths.split())) > 200
    assert int(page_width) <= 500
