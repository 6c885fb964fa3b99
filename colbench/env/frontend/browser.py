"""HTML text to full-page PNG in real Chromium, offline, the same bytes each time, whatever the page tries.

    with Renderer("runs/x/screenshots") as renderer:
        pictures = renderer.render(["<html>...</html>", ...])    # [Picture(path, refusal, layout), ...]

The browser lives in a child process (colbench.env.frontend.worker) that the parent kills, with everything below it,
when a page takes too long or too much memory; the next page gets a fresh one. The layers, from the inside:
  1. Scripts are off, a Content-Security-Policy forbids frames, forms and plug-ins, every request is answered locally or
     refused.
  2. Chromium's own sandbox (not when run as root, where Chromium refuses it).
  3. A network namespace without any interface for worker and browser, where the system allows one (`unshare`).
  4. Deadline and memory cap, watched from outside.
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

Picture = namedtuple("Picture", "path refusal layout")  # path: of the PNG, or None with the reason in refusal

LARGEST_PAGE = 2_000_000  # bytes of HTML
DEADLINE_S = 25  # seconds a page may take
LARGEST_MEMORY = 2.5e9  # bytes of one process; twice that for all together
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = ("no browser found; install one with `python -m playwright install --with-deps chromium`, or as root with "
              "`apt-get install chromium fonts-liberation` (or name one in the environment variable COLBENCH_CHROMIUM)")
ROOT = Path(__file__).parents[3]


class Renderer:
    """Renders pages into a folder, where each lies under a hash of the page and the renderer.

    What is there is not rendered twice. folder: where PNGs (and with `layout`, what the scripted reviewer reads, as
    JSON) go. tabs: pages at once; more than 2 never helped on 2 cores. UserError where no browser can be started.
    """

    def __init__(self, folder, layout: bool = False, tabs: int = 2, deadline: float = DEADLINE_S,
                 memory: float = LARGEST_MEMORY):
        self.folder, self.layout, self.tabs, self.deadline, self.memory = Path(folder), layout, tabs, deadline, memory
        self.folder.mkdir(parents=True, exist_ok=True)
        self.worker, self.rendered, self.restarts, self._number = None, 0, 0, 0
        self.isolation = network_namespace()
        self._scratch = tempfile.TemporaryDirectory(prefix="colbench-browser-")
        self.fonts = self._write_fonts()
        self._refused = {}  # key -> reason; not kept on disk: a refusal can be a matter of load
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
        """The safety layers that are active, in one line for the user."""
        browser = "no sandbox of the browser (you are root)" if os.geteuid() == 0 else "the sandbox of the browser"
        network = "a network namespace without network" if self.isolation else \
            "no network namespace (unshare -n does not work here)"
        return (f"pages are rendered with scripts off and all requests answered locally; {browser}; {network}; "
                f"{self.deadline:.0f} s and {self.memory / 1e9:.1f} GB a page")

    def path(self, page: str) -> Path:
        """Where the picture of a page lies, rendered or not."""
        text = f"{self.fingerprint}\n{page}"
        return self.folder / f"{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}.png"

    def render(self, pages: list) -> list:
        """A Picture for each page (HTML text, or None: a refusal). Equal pages are rendered once."""
        results, todo = {}, {}
        for page in pages:
            if page is None:
                results[page] = Picture(None, "no page", None)
            elif len(page.encode("utf-8", "replace")) > LARGEST_PAGE:
                results[page] = Picture(None, f"the page is larger than {LARGEST_PAGE} bytes", None)
            elif (path := self.path(page)) in self._refused:
                results[page] = Picture(None, self._refused[path], None)
            elif path.exists() and (not self.layout or path.with_suffix(".json").exists()):
                layout = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) if self.layout else None
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
                write_aside(path.with_suffix(".json"), lambda temporary: temporary.write_text(text, encoding="utf-8"))
            write_aside(path, lambda temporary: temporary.write_bytes(base64.b64decode(done["png"])))
            results[page] = Picture(path, None, done["layout"] if self.layout else None)
            self.rendered += 1
        return [results[page] for page in pages]

    def _draw(self, pages: list):
        """Yield (page, the worker's answer). A page is refused only for what happened to it alone."""
        alone = []
        waiting, flying = list(reversed(pages)), {}  # flying: number -> (page, when it must be done)
        while waiting or flying:
            while waiting and len(flying) < self.tabs:
                page = waiting.pop()
                number = self._send(page)
                flying[number] = (page, time.monotonic() + self.deadline)
            problem, row = self._receive(min(until for _, until in flying.values()))
            if row and "refusal" in row and len(flying) > 1:
                alone.append(flying.pop(row["number"])[0])
            elif row:
                yield flying.pop(row["number"])[0], row
            elif len(flying) > 1:
                alone += [page for page, _ in flying.values()]
                flying = {}
            else:
                yield flying.popitem()[1][0], {"refusal": problem}
        for page in alone:
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
        """(None, the worker's next answer), or (the problem, None) after the worker was killed."""
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
        kept = ("PATH", "LANG", "PLAYWRIGHT_BROWSERS_PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
        # no key or token of the user's gets near the browser
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        home = Path(self._scratch.name)
        environment |= {
            "HOME": str(home), "TMPDIR": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home),
            "FONTCONFIG_FILE": str(home / "fonts.conf"),
            "PLAYWRIGHT_BROWSERS_PATH": os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or str(
                Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "ms-playwright")}
        named = os.environ.get("COLBENCH_CHROMIUM", "")
        executable = named
        if not executable and not any(Path(environment["PLAYWRIGHT_BROWSERS_PATH"]).glob("chromium*")):
            executable = next(filter(None, map(shutil.which, NAMES)), "")
        if named and not shutil.which(named):
            raise UserError(f"COLBENCH_CHROMIUM={named}: no such program")
        command = [*self.isolation, sys.executable, "-m", "colbench.env.frontend.worker", executable, str(tabs)]
        self.worker = Worker(command, environment)
        deadline, row = time.monotonic() + 60, None
        while row is None and time.monotonic() < deadline:
            row = self.worker.read(0.5)
        if not isinstance(row, dict) or "failed" in row:
            reason = row["failed"] if isinstance(row, dict) else self.worker.last_words() or "it does not answer"
            self.worker.kill()
            self.worker = None
            raise UserError(NO_BROWSER if reason == "no browser" else
                            f"the browser does not start: {reason}; {NO_BROWSER}")
        self.browser = row["browser"]
        if not hasattr(self, "fingerprint"):
            from colbench.env.frontend.worker import FLAGS, VIEWPORT
            flags = hashlib.sha256("\n".join(FLAGS).encode()).hexdigest()[:8]
            self.fingerprint = (f"chromium {self.browser}, {VIEWPORT['width']}x{VIEWPORT['height']}, flags {flags}, "
                                f"fonts {self.fonts}, rules {rules_version()}")
            text = json.dumps({"fingerprint": self.fingerprint, "executable": row["executable"], "flags": FLAGS,
                               "viewport": VIEWPORT, "fonts": self.font_files, "layers": self.layers}, indent=1)
            told = self.folder / "renderer.json"
            if not told.exists() or told.read_text(encoding="utf-8") != text:
                write_aside(told, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _write_fonts(self) -> str:
        """Write the font configuration of the browser. Returns a hash of the fonts, for the fingerprint.

        The Liberation fonts, or all of the system's where there are none.
        """
        text = (Path(__file__).parent / "assets" / "fonts.conf").read_text()
        folders = [Path(part.split("</dir>")[0]) for part in text.split("<dir>")[1:]]
        files = sorted(file for folder in folders if folder.is_dir() for file in folder.glob("*.[to]tf"))
        name = "Liberation"
        if not files:
            name = "of the system"
            own = "<dir>/usr/share/fonts</dir><dir>/usr/local/share/fonts</dir>\n  <cachedir>"
            text = text.replace("<cachedir>", own)
            files = sorted(Path("/usr/share/fonts").rglob("*.[to]tf"))
        Path(self._scratch.name, "fonts.conf").write_text(text.replace("CACHE", f"{self._scratch.name}/fonts"))
        digest, self.font_files = hashlib.sha256(), [str(file) for file in files]
        for file in files:
            digest.update(file.read_bytes())
        return f"{name} {digest.hexdigest()[:8]}"


def rules_version() -> str:
    """Hash of what else decides how a page looks: what it gets served, and how it is photographed."""
    folder, names = Path(__file__).parent, ("resources.py", "configuration.py", "worker.py", "layout.py")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()[:8]


def network_namespace() -> list:
    """The command in front of another one that takes its network away, [] where the system does not allow that."""
    for command in (["unshare", "-n", "--"], ["unshare", "-cn", "--"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


class Worker:
    """The child process, with everything that it starts."""

    def __init__(self, command, environment):
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
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
            pass  # `read` tells that it has ended

    def read(self, seconds: float):
        """The next answer, "ended", or None after so many seconds."""
        try:
            return self._rows.get(timeout=seconds)
        except queue.Empty:
            return None

    def tree(self) -> list:
        """All its processes, itself first."""
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.Error:
            return []

    def memory(self) -> float:
        """Bytes of the largest process, or half of all together if that is more."""
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
        """Kill the whole tree. The top goes last: as long as it lives, everything below it can be found."""
        while below := [p for p in self.tree()[1:] if _alive(p)]:
            for process in below:
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
