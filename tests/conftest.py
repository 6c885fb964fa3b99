"""One thread a test: pytest-xdist runs as many tests at once as there are cores, and threads of two of them would only
wait for each other. Stages that a test starts inherit it."""
import contextlib
import importlib
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from colbench.env.frontend.browser import NAMES, NO_BROWSER

os.environ["OMP_NUM_THREADS"] = "1"


class SharedRunsTogether(LoadScopeScheduling):
    """Tests go to whoever is free, but those of a file that shares a run of all stages to one: it is made once."""

    FILES = {f"tests/test_{name}.py" for name in ("stages", "house", "frontend_stages", "crash", "interop")}

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return file if file in self.FILES else nodeid


def pytest_xdist_make_scheduler(config, log):
    return SharedRunsTogether(config, log)


LONGEST = ("test_first_command_ends_with_the_table", "test_commands_that_need_no_gpu_and_no_hub_run_as_printed")


def pytest_collection_modifyitems(items):
    """What takes longest comes first: the other workers go on meanwhile."""
    items.sort(key=lambda item: item.name not in LONGEST)


def browser_program() -> str | None:
    """The browser that colbench/env/frontend/browser.py takes: "" is Playwright's own, None that there is none."""
    caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    own = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or caches / "ms-playwright")
    if named := os.environ.get("COLBENCH_CHROMIUM"):
        return shutil.which(named)
    return "" if any(own.glob("chromium*")) else next(filter(None, map(shutil.which, NAMES)), None)


def pytest_terminal_summary(terminalreporter):
    """Says why tests were skipped, where that can be helped."""
    if browser_program() is None:
        terminalreporter.write_line(f"tests that need a browser were skipped: {NO_BROWSER}")


needs_browser = pytest.mark.skipif(browser_program() is None, reason=NO_BROWSER)


def help_page(script: str, env: str) -> str:
    """What `python SCRIPT.py --env ENV --help` prints."""
    page, words = io.StringIO(), sys.argv
    try:
        sys.argv = [f"{script}.py", "--env", env, "--help"]
        with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
            importlib.import_module(script).parse_args()
    finally:
        sys.argv = words
    return page.getvalue()
