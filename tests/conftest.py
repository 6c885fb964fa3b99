"""One thread per test, because pytest-xdist already runs one test per core.

Stages that a test starts inherit the setting."""
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
    """Tests go to any free worker, but a file whose tests share a run of all stages goes to one.

    So that run is made once."""

    FILES = {f"tests/test_{name}.py"
             for name in ("stages", "layers", "frontend_stages", "crash", "interop")}

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return file if file in self.FILES else nodeid


def pytest_xdist_make_scheduler(config, log):
    return SharedRunsTogether(config, log)


LONGEST = ("test_first_command_ends_with_the_table",
           "test_commands_that_need_no_gpu_and_no_hub_run_as_printed")


def pytest_collection_modifyitems(items):
    """Start the longest tests first; the other workers run the rest meanwhile."""
    items.sort(key=lambda item: item.name not in LONGEST)


def browser_program() -> str | None:
    """The browser that colbench/env/frontend/browser.py uses.

    "" is Playwright's own; None means that none was found."""
    caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    own = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or caches / "ms-playwright")
    if named := os.environ.get("COLBENCH_CHROMIUM"):
        return shutil.which(named)
    return "" if any(own.glob("chromium*")) else next(filter(None, map(shutil.which, NAMES)), None)


def pytest_terminal_summary(terminalreporter):
    """Say why tests were skipped when the user can fix it."""
    if browser_program() is None:
        terminalreporter.write_line(f"tests that need a browser were skipped: {NO_BROWSER}")


needs_browser = pytest.mark.skipif(browser_program() is None, reason=NO_BROWSER)


def help_page(script: str, env: str) -> str:
    """What `python SCRIPT.py --env ENV --help` prints."""
    page = io.StringIO()
    argv = sys.argv
    try:
        sys.argv = [f"{script}.py", "--env", env, "--help"]
        with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
            importlib.import_module(script).parse_args()
    finally:
        sys.argv = argv
    return page.getvalue()
