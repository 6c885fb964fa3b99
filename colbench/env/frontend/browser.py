"""HTML text to full-page PNG in real Chromium: offline, always the same bytes, safe for any page.

    with Renderer("runs/x/screenshots") as renderer:
        pictures = renderer.render(["<html>...</html>", ...])  # [Picture, ...]

The browser runs in a child process (colbench.env.frontend.worker). If a page takes too long or too
much memory, the parent kills that process and its descendants; the next page gets a fresh one. The
safety layers, from the inside:
  1. Scripts are off. A Content-Security-Policy forbids frames, forms and plug-ins. Every request is
     answered locally or refused.
  2. Chromium's own sandbox (not as root, where Chromium refuses it).
  3. A network namespace without interfaces, if the system allows one (`unshare`).
  4. A deadline and a memory limit, watched by the parent.
`Renderer.layers` says which of them are active.
"""
import base64
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from pathlib import Path

import psutil

from colbench.run.errors import UserError
from colbench.run.files import write_aside

# path: of the PNG, or None; refusal: then the reason; layout: what the scripted reviewer reads
Picture = namedtuple("Picture", "path refusal layout")

LARGEST_PAGE = 2_000_000  # bytes of HTML
DEADLINE_S = 25  # seconds per page
LARGEST_MEMORY = 2.5e9  # bytes per process; twice that for all together
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = ("no browser found; install one with `python -m playwright install --with-deps "
              "chromium`, or as root with `apt-get install chromium fonts-liberation` (or name one "
              "in the environment variable COLBENCH_CHROMIUM)")
ROOT = Path(__file__).parents[3]


class Renderer:
    """Renders pages into a folder. Files are named by a hash of page and renderer, and kept.

    folder: for PNGs and, with `layout`, JSON files for the scripted reviewer. tabs: pages rendered
    at once; more than 2 never helped on 2 cores. deadline: seconds per page. memory: bytes per
    process. UserError if no browser starts.
    """

    def __init__(self, folder, layout: bool = False, tabs: int = 2, deadline: float = DEADLINE_S,
                 memory: float = LARGEST_MEMORY):
        self.folder, self.layout, self.tabs = Path(folder), layout, tabs
        self.deadline, self.memory = deadline, memory
        self.folder.mkdir(parents=True, exist_ok=True)
        self.worker = None
        self.rendered = self.restarts = self._number = 0
        self.isolation = network_namespace()
        self._scratch = tempfile.TemporaryDirectory(prefix="colbench-browser-")
        self.fonts = self._write_fonts()
        self._refused = {}  # path -> reason; not kept on disk, because load can cause a refusal
        try:
            self._start(self.tabs)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the browser."""
        if self.worker:
            self.worker.kill()
            self.worker = None
        self._scratch.cleanup()

    @property
    def layers(self) -> str:
        """The active safety layers, in one line for the user."""
        root = os.geteuid() == 0
        browser = "no sandbox inside Chromium (you are root)" if root else "Chromium's own sandbox"
        network = "no network namespace (unshare -n does not work here)"
        if self.isolation:
            network = "a network namespace without interfaces"
        return (f"pages are rendered with scripts off and all requests answered locally; {browser};"
                f" {network}; {self.deadline:.0f} s and {self.memory / 1e9:.1f} GB per page")

    def path(self, page: str) -> Path:
        """The path of a page's picture, rendered or not."""
        text = f"{self.fingerprint}\n{page}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / f"{digest[:24]}.png"

    def render(self, pages: list) -> list:
        """A Picture for each page: HTML text, or None (refused). Equal pages are rendered once."""
        results, todo = {}, {}
        for page in pages:
            if page is None:
                results[page] = Picture(None, "no page", None)
            elif len(page.encode("utf-8", "replace")) > LARGEST_PAGE:
                results[page] = Picture(None, f"the page is larger than {LARGEST_PAGE} bytes", None)
            elif (path := self.path(page)) in self._refused:
                results[page] = Picture(None, self._refused[path], None)
            elif path.exists() and not self.layout:
                results[page] = Picture(path, None, None)
            elif path.exists() and path.with_suffix(".json").exists():
                layout = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                results[page] = Picture(path, None, layout)
            else:
                todo[page] = path
        for page, done in self._draw(list(todo)):
            path = todo[page]
            if "refusal" in done:
                self._refused[path] = done["refusal"]
                results[page] = Picture(None, done["refusal"], None)
                continue
            if self.layout:
                text = json.dumps(done["layout"])
                write_aside(path.with_suffix(".json"),
                            lambda temporary: temporary.write_text(text, encoding="utf-8"))
            png = base64.b64decode(done["png"])
            write_aside(path, lambda temporary: temporary.write_bytes(png))
            results[page] = Picture(path, None, done["layout"] if self.layout else None)
            self.rendered += 1
        return [results[page] for page in pages]

    def _draw(self, pages: list):
        """Yield (page, the worker's answer).

        A page that fails next to others is rendered again alone, and only then refused.
        """
        waiting = list(reversed(pages))
        in_progress = {}  # number -> (page, its deadline)
        again = []
        while waiting or in_progress:
            while waiting and len(in_progress) < self.tabs:
                page = waiting.pop()
                number = self._send(page)
                in_progress[number] = (page, time.monotonic() + self.deadline)
            problem, row = self._receive(min(until for _, until in in_progress.values()))
            if row and "refusal" in row and len(in_progress) > 1:
                again.append(in_progress.pop(row["number"])[0])
            elif row:
                yield in_progress.pop(row["number"])[0], row
            elif len(in_progress) > 1:
                again += [page for page, _ in in_progress.values()]
                in_progress = {}
            else:
                yield in_progress.popitem()[1][0], {"refusal": problem}
        for page in again:
            number = self._send(page)
            problem, row = self._receive(time.monotonic() + self.deadline)
            yield page, {"refusal": problem} if problem else row

    def _send(self, page: str) -> int:
        if not self.worker:
            self.restarts += 1
            self._start(self.tabs)
        self._number += 1
        self.worker.write({"number": self._number, "page": page, "layout": self.layout})
        return self._number

    def _receive(self, until: float):
        """(None, the worker's next answer), or (problem, None) after killing the worker."""
        problem = None
        while not problem:
            row = self.worker.read(0.2)
            if row is not None and row != "ended":
                return None, row
            if row == "ended":
                problem = "the browser crashed on it"
            elif time.monotonic() > until:
                problem = f"it took longer than {self.deadline:.0f} seconds"
            elif self.worker.memory() > self.memory:
                problem = f"it took more than {self.memory / 1e9:.1f} GB of memory"
        self.worker.kill()
        self.worker = None
        return problem, None

    def _start(self, tabs: int) -> None:
        # the browser gets none of the user's keys or tokens
        kept = ("PATH", "LANG", "PLAYWRIGHT_BROWSERS_PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        browsers = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
        if not browsers:
            caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
            browsers = str(Path.home() / caches / "ms-playwright")
        home = self._scratch.name
        environment |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), home)
        environment |= {"FONTCONFIG_FILE": f"{home}/fonts.conf",
                        "PLAYWRIGHT_BROWSERS_PATH": browsers}
        executable = os.environ.get("COLBENCH_CHROMIUM", "")
        if executable and not shutil.which(executable):
            raise UserError(f"COLBENCH_CHROMIUM={executable}: no such program")
        if not executable and not any(Path(browsers).glob("chromium*")):
            executable = next(filter(None, map(shutil.which, NAMES)), "")
        command = [*self.isolation, sys.executable, "-m", "colbench.env.frontend.worker",
                   executable, str(tabs)]
        self.worker = Worker(command, environment)
        deadline = time.monotonic() + 60
        row = None
        while row is None and time.monotonic() < deadline:
            row = self.worker.read(0.5)
        if not isinstance(row, dict) or "failed" in row:
            if isinstance(row, dict):
                reason = row["failed"]
            else:
                reason = self.worker.last_words() or "it does not answer"
            self.worker.kill()
            self.worker = None
            if reason == "no browser":
                raise UserError(NO_BROWSER)
            raise UserError(f"the browser does not start: {reason}; {NO_BROWSER}")
        self.browser = row["browser"]
        if not hasattr(self, "fingerprint"):
            self._describe(row["executable"])

    def _describe(self, executable: str) -> None:
        """Set the fingerprint and write renderer.json."""
        from colbench.env.frontend.worker import FLAGS, VIEWPORT
        size = f"{VIEWPORT['width']}x{VIEWPORT['height']}"
        flags = hashlib.sha256("\n".join(FLAGS).encode()).hexdigest()[:8]
        self.fingerprint = (f"chromium {self.browser}, {size}, flags {flags}, "
                            f"fonts {self.fonts}, rules {rules_version()}")
        text = json.dumps({
            "fingerprint": self.fingerprint,
            "executable": executable,
            "flags": FLAGS,
            "viewport": VIEWPORT,
            "fonts": self.font_files,
            "layers": self.layers,
        }, indent=1)
        path = self.folder / "renderer.json"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_aside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _write_fonts(self) -> str:
        """Write the browser's font configuration. Return a hash of its fonts, for the fingerprint.

        These are the Liberation fonts, or all system fonts if Liberation is not installed.
        """
        text = (Path(__file__).parent / "assets" / "fonts.conf").read_text()
        folders = [Path(part.split("</dir>")[0]) for part in text.split("<dir>")[1:]]
        files = sorted(file for folder in folders if folder.is_dir()
                       for file in folder.glob("*.[to]tf"))
        name = "Liberation"
        if not files:
            name = "of the system"
            own = "<dir>/usr/share/fonts</dir><dir>/usr/local/share/fonts</dir>\n  <cachedir>"
            text = text.replace("<cachedir>", own)
            files = sorted(Path("/usr/share/fonts").rglob("*.[to]tf"))
        text = text.replace("CACHE", f"{self._scratch.name}/fonts")
        Path(self._scratch.name, "fonts.conf").write_text(text)
        self.font_files = [str(file) for file in files]
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        return f"{name} {digest.hexdigest()[:8]}"


def rules_version() -> str:
    """Hash of the source files that decide what pages are served and how they are drawn."""
    folder = Path(__file__).parent
    names = ("resources.py", "configuration.py", "worker.py", "layout.py")
    sources = b"".join((folder / name).read_bytes() for name in names)
    return hashlib.sha256(sources).hexdigest()[:8]


def network_namespace() -> list:
    """The prefix that runs a command without a network, [] if the system does not allow that."""
    if shutil.which("unshare"):
        for prefix in (["unshare", "-n", "--"], ["unshare", "-cn", "--"]):
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
    return []


class Worker:
    """The child process and its descendants."""

    def __init__(self, command, environment):
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            cwd=ROOT, env=environment, start_new_session=True)
        self._rows = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self._rows.put(json.loads(line))
        self._rows.put("ended")

    def write(self, row: dict) -> None:
        """Send it a line."""
        try:
            self.process.stdin.write(json.dumps(row).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `read` reports that it has ended

    def read(self, seconds: float):
        """The next answer, "ended", or None if there is none within `seconds`."""
        try:
            return self._rows.get(timeout=seconds)
        except queue.Empty:
            return None

    def tree(self) -> list:
        """The process and its descendants."""
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.Error:
            return []

    def memory(self) -> float:
        """Bytes of the largest process, or half the total if that is more."""
        sizes = []
        for process in self.tree():
            try:
                sizes.append(process.memory_info().rss)
            except psutil.Error:
                pass
        return max(max(sizes, default=0), sum(sizes) / 2)

    def last_words(self) -> str:
        """The last line on its stderr."""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().split("\n")
        return lines[-1][:200]

    def kill(self) -> None:
        """Kill the whole tree, the top last: while it lives, its descendants can be found."""
        while descendants := [process for process in self.tree()[1:] if _alive(process)]:
            for process in descendants:
                try:
                    process.kill()
                except psutil.Error:
                    pass
            if self.process.poll() is not None:
                break
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self._errors.close()


def _alive(process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
