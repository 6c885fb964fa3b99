"""Pages in a real browser: equal bytes each time, Tailwind, pictures, and hostile pages."""
import asyncio
import base64
import hashlib
import html
import io
import json
import os
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from colbench.env.frontend import browser
from colbench.env.frontend.browser import Renderer
from colbench.env.frontend.configuration import configured, settings
from colbench.env.frontend.pages import BUSINESSES, compose, page_tasks
from colbench.env.frontend.resources import (
    asset,
    needs_scripts,
    placeholder,
    play_script,
    tailwind_sheet,
)
from colbench.run.errors import UserError
from conftest import browser_program, needs_browser
from hostile_pages import BURDENS, ESCAPES, HANGS, PLAY, SLOW
from tailwind_settings import HOSTILE, SPELLINGS, page

SHEET = ('<link href="https://cdn.jsdelivr.net/npm/tailwindcss@2.2.19/dist/tailwind.min.css" '
         'rel="stylesheet">')
PAGES = [task["ground_truth"] for task in page_tasks("test", 8)] + [
    f'<html>{SHEET}<body class="bg-gray-100"><div class="animate-spin w-8 h-8 bg-red-500"></div>'
    '<div class="container mx-auto md:w-1/2 hover:bg-blue-500 focus:ring-2 space-y-0.5 rounded-2xl '
    'shadow-lg p-2.5"><img class="rounded-full shadow-2xl" src="https://picsum.photos/300/300">'
    '<input value="caret"></div></body></html>',
]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    with Renderer(tmp_path_factory.mktemp("shots"), layout=True) as renderer:
        yield renderer


def pixels(picture):
    return np.asarray(Image.open(picture.path).convert("RGB"))


@pytest.mark.slow
@needs_browser
def test_same_bytes_in_every_launch_with_any_tabs_and_network(tmp_path, monkeypatch):
    def draw(name, tabs):
        with Renderer(tmp_path / name, tabs=tabs) as renderer:
            pages = [*PAGES, '<html><body><input autofocus value="caret">'
                     '<marquee>x</marquee></body></html>']
            pictures = renderer.render(pages)
            assert renderer.rendered == len(pages) and renderer.restarts == 0
        return [picture.path.read_bytes() for picture in pictures]
    first = draw("one", 1)
    assert draw("three", 3) == first
    # without a network namespace pages look the same
    monkeypatch.setattr(browser, "network_namespace", lambda: [])
    assert draw("open", 2) == first


@needs_browser
def test_existing_pictures_are_not_rendered_again(tmp_path):
    with Renderer(tmp_path, layout=True) as renderer:
        first = renderer.render([PAGES[0], PAGES[0], PAGES[1]])
        assert renderer.rendered == 2 and first[0] == first[1]
    with Renderer(tmp_path, layout=True) as renderer:
        assert renderer.render(PAGES[:2]) == [first[0], first[2]] and renderer.rendered == 0


@needs_browser
def test_fingerprint_names_browser_flags_and_fonts(renderer):
    description = json.loads((renderer.folder / "renderer.json").read_text())
    assert "--disable-partial-raster" in description["flags"]
    assert any("LiberationSans-Regular" in file for file in description["fonts"])
    assert renderer.fingerprint.startswith("chromium ") and "1366x768" in renderer.fingerprint
    assert "fonts Liberation " in renderer.fingerprint
    assert "network" in renderer.layers and "25 s" in renderer.layers


def plain(pages, renderer, scripts):
    """Pictures from a plain browser: it serves the whole style sheet, has no policy and, with
    `scripts`, runs all scripts of a page."""
    from playwright.async_api import async_playwright

    from colbench.env.frontend.worker import FLAGS

    async def draw():
        async with async_playwright() as playwright:
            program = await playwright.chromium.launch(
                executable_path=browser_program() or None,
                args=[*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])],
                env={**os.environ, "FONTCONFIG_FILE": f"{renderer._scratch.name}/fonts.conf"})
            shots = []
            for page in pages:
                tab = await program.new_page(viewport={"width": 1366, "height": 768},
                                             java_script_enabled=scripts)

                async def answer(route):
                    url = route.request.url
                    if "page.invalid" in url:
                        body, kind = page, "text/html; charset=utf-8"
                    elif ".css" in url:
                        body, kind = asset("tailwind-2.2.19.css"), "text/css"
                    elif body := play_script(url):
                        kind = "text/javascript"
                    else:
                        body, kind = placeholder(url), "image/svg+xml"
                    await (route.fulfill(body=body, content_type=kind) if body else route.abort())
                await tab.route("**/*", answer)
                await tab.goto("http://page.invalid/")
                await tab.wait_for_timeout(200 * scripts)
                shot = await tab.screenshot(full_page=True, animations="disabled", caret="hide")
                shots.append(np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")))
                await tab.close()
            return shots
    return asyncio.run(draw())


@pytest.mark.slow
@needs_browser
def test_reduced_sheet_gives_the_pixels_of_the_whole_sheet(renderer):
    for i, (shot, picture) in enumerate(zip(plain(PAGES, renderer, False), renderer.render(PAGES))):
        assert np.array_equal(shot, pixels(picture)), i
        assert len(tailwind_sheet(PAGES[i])) < 20_000


def test_sheet_keeps_escaped_and_combined_classes():
    sheet = tailwind_sheet(
        '<p class="2xl:p-4 md:w-1/2 group-hover:opacity-100 group space-y-0.5 MX-Auto">')
    for rule in (r".\32xl\:p-4{", r".md\:w-1\/2{", r".group:hover .group-hover\:opacity-100{",
                 r".space-y-0\.5>", ".mx-auto{"):
        assert rule in sheet
    assert ".p-4{" not in sheet
    assert ".mt-1{" in tailwind_sheet('<p class="m&#116;-1">')  # a character reference
    assert sheet.count("{") == sheet.count("}")


@pytest.mark.parametrize("url, size", [
    ("https://picsum.photos/id/48/640/480", (640, 480)),
    ("https://picsum.photos/320/200", (320, 200)),
    ("https://picsum.photos/250", (250, 250)), ("http://picsum.photos/seed/a1/90/70", (90, 70)),
    ("https://picsum.photos/id/7/80.jpg", (80, 80)),
    ("https://source.unsplash.com/random/600x300/?sea,boat", (600, 300)),
    ("https://source.unsplash.com/400x200/?a-b", (400, 200)),
    ("https://images.unsplash.com/photo-1501?auto=format&w=500&h=100", (500, 100)),
    ("https://via.placeholder.com/150x50?text=1", (150, 50)),
    ("https://picsum.photos/id/48/200/300-estate", (200, 300)),
    ("https://picsum.photos/99999/50", (4096, 50)),
])
@needs_browser
def test_pictures_have_the_requested_size(renderer, url, size):
    layout = renderer.render([f'<html><body><img src="{url}"></body></html>'])[0].layout
    assert (layout["pictures"][0]["w"], layout["pictures"][0]["h"]) == size


@needs_browser
def test_other_requests_are_refused(renderer):
    urls = "https://example.com/640/480", "https://picsum.photos/640/480"
    refused, answered = renderer.render([f'<html><body><img src="{url}"></body></html>'
                                         for url in urls])
    assert pixels(refused).std() < 20 < pixels(answered).std()


@needs_browser
def test_pages_run_in_quirks_mode_and_whole(renderer):
    quirks, long = renderer.render([
        '<html><body><div style="width:50;height:50;background:#f00"></div></body></html>',
        '<html><body style="margin:0"><div style="height:3000px;background:#00f"></div></body>'
        '</html>'])
    # lengths without a unit count only in quirks mode
    assert (pixels(quirks)[20, 20] == (255, 0, 0)).all()
    assert pixels(long).shape == (3000, 1366, 3)
    assert (pixels(long)[2999, 1365] == (0, 0, 255)).all()


@needs_browser
@pytest.mark.parametrize("script", [
    PLAY, '<script src="https://cdn.jsdelivr.net/npm/@tailwindcss/browser@4"></script>'])
def test_scripts_run_only_where_tailwind_needs_them(renderer, script):
    body = ('<body><div class="w-[300px] h-[100px] bg-[#ff0000]"></div>'
            '<script>document.body.innerHTML = ""</script></body>')
    with_script, without = renderer.render([f"<html>{script}{body}</html>",
                                            f"<html><!-- {script} -->{SHEET}{body}</html>"])
    red = (pixels(with_script) == (255, 0, 0)).all(-1)
    assert red.sum() == 300 * 100  # Tailwind's script ran, the page's own did not
    assert not (pixels(without) == (255, 0, 0)).all(-1).any()


NOT_SHOWN = {"never called", "a condition", "no require in a browser", "an unknown name",
             "another variable", "not a script", "before", "object before", "Tailwind deferred",
             "overwritten", "commented out"}
QUICK = ("script type=module", "variables", "before")


@needs_browser
@pytest.mark.parametrize("names", [QUICK, pytest.param([*SPELLINGS][::4], marks=pytest.mark.slow)],
                         ids=["some", "more"])
def test_settings_of_tailwind_in_any_place_and_spelling(renderer, names):
    pages = [SPELLINGS[name] for name in names]
    shots = plain(pages, renderer, True)
    for name, shot, picture in zip(names, shots, renderer.render(pages)):
        red = (pixels(picture) == (255, 0, 0)).all(-1).sum()
        assert (name, red) == (name, 0 if name in NOT_SHOWN else 64 * 64)
        assert np.array_equal(shot, pixels(picture)), name


@needs_browser
@pytest.mark.parametrize("names", [
    ["a call", "a getter"], pytest.param(list(HOSTILE), marks=pytest.mark.slow),
], ids=["some", "all"])
def test_nothing_but_settings_runs(renderer, names):
    def ran(shot):
        return (shot == (1, 2, 3)).all(-1).any()
    pages = [page(HOSTILE[name]) for name in names]
    shown = list(map(pixels, renderer.render(pages)))
    assert [name for name, shot in zip(names, shown) if ran(shot)] == []
    # in a plain browser each of them runs
    assert [name for name, shot in zip(names, plain(pages, renderer, True)) if not ran(shot)] == []


@pytest.mark.parametrize("name", HOSTILE)
def test_new_scripts_contain_only_settings(name):
    text, sources = configured(HOSTILE[name])
    for digest in sources:  # only these scripts may run
        bodies = [*re.findall("<script>(.*?)</script>", text, re.DOTALL),
                  *map(html.unescape, re.findall('onload="(.*?)"', text))]
        allowed, = [body for body in bodies if base64.b64encode(
            hashlib.sha256(body.encode()).digest()).decode() in digest]
        assert not re.search("document|(?<!own_)location", re.sub("'[^']*'", "", allowed))


@pytest.mark.parametrize("script, expected", [
    ("// ours\nwindow.tailwind.config = {a: [1, .5, 'x', `y`, /z/g,], 'b': -2, [3]: !0, "
     "c: {...d, e}}; go()",
     "window[\"tailwind\"][\"config\"] = {a: [1, .5, 'x', `y`, /z/g], 'b': - 2, [3]: ! 0, "
     "c: {...own_d, e: own_e}};"),
    ("tailwind.config = {a: () => 1, b: 2, c() {}, async d() {}, get e() {}, f: g(), h: new I, "
     "j: k ? 1 : 2, l: x => 3}", 'tailwind["config"] = {b: 2};'),
    ("var location = 'x', {name: n, ...rest} = tailwind", ""),
    ("let {name: n, p} = tailwind", "let {name: own_n, p: own_p} = tailwind;"),
    ("tailwind.a.constructor = 1", ""), ("tailwind['a']['__proto__'].b = 1", ""),
    ("tailwind['\\x61'] = 1", ""), ("tailwind.config = {", ""), ("tailwind.config = '\0'", ""),
    ("tailwind.config = " + "[" * 5000, ""), ("", ""),
    ("a(`${`}`}`); b(/[/]`/, c / d / 2)\ntailwind.x = 1", 'tailwind["x"] = 1;'), ("}}}\n)\n", ""),
])
def test_settings_read_from_a_script(script, expected):
    assert settings(script, set()) == expected


def test_which_pages_need_scripts():
    assert needs_scripts(f"<html>{PLAY}")
    assert needs_scripts("<SCRIPT defer src=//cdn.tailwindcss.com?plugins=forms></SCRIPT>")
    others = ("<script src='https://evil.example/cdn.tailwindcss.com'></script>",
              "<script>cdn.tailwindcss.com</script>")
    assert not any(needs_scripts(page) for page in (*PAGES, *others))


# ------------------------------------------------------------------------------------ hostile pages


class Listener:
    """Records what reaches a TCP and a UDP port of this machine."""

    def __init__(self):
        self.heard = []
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self):
        while True:
            self.heard.append(self.udp.recv(100))

    def _accept(self):
        while True:
            connection, _ = self.tcp.accept()
            self.heard.append("tcp")
            connection.close()


@pytest.fixture(scope="module")
def listener():
    return Listener()


QUICK_AND_SLOW = pytest.mark.parametrize(
    "slow", [False, pytest.param(True, marks=pytest.mark.slow)])


def some(pages, slow):
    return {name: page for name, page in pages.items() if (name in SLOW) == slow}


def good(i):
    return compose("Oak Hall", {"background": "blue"}).replace("</body>", f"</body><!-- {i} -->")


def no_process_of(tree):
    deadline = time.time() + 10
    while (left := [p for p in tree if p.is_running()
                    and p.status() != psutil.STATUS_ZOMBIE]) and time.time() < deadline:
        time.sleep(0.05)
    return not left


LET_THROUGH = """
import asyncio, sys
from colbench.env.frontend import worker
policy = worker.policy
worker.policy = lambda scripts, inline: policy(scripts, ["'unsafe-inline'", "'unsafe-eval'"])
asyncio.run(worker.main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.fixture()
def scripts_run(monkeypatch):
    """Lets all scripts of a page run as if they were settings, to test the inner layers."""
    real = browser.Worker
    monkeypatch.setattr(browser, "Worker", lambda command, environment: real(
        [*command[:-4], "-c", LET_THROUGH, *command[-2:]], environment))


@needs_browser
def test_scripts_run_when_let_through(scripts_run, tmp_path):
    with Renderer(tmp_path) as renderer:
        picture = renderer.render([page(HOSTILE["a call"])])[0]
        assert (pixels(picture) == (1, 2, 3)).all(-1).any()


@needs_browser
@QUICK_AND_SLOW
@pytest.mark.parametrize("isolated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nothing_gets_out(tmp_path, monkeypatch, listener, scripts_run, isolated, slow):
    if not isolated:  # the inner layers alone; only the network namespace stops UDP
        monkeypatch.setattr(browser, "network_namespace", lambda: [])
    secret = tmp_path / "secret.png"
    Image.new("RGB", (400, 400), (1, 254, 3)).save(secret)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
                       or str(Path.home() / ".cache/ms-playwright"))
    monkeypatch.setenv("HOME", str(home))
    with Renderer(tmp_path / "shots") as renderer:
        if isolated and not renderer.isolation:
            assert "no network namespace" in renderer.layers
            pytest.skip("no network namespace on this machine")
        expected = renderer.render([good(0)])[0].path.read_bytes()
        for i, (name, page) in enumerate(some(ESCAPES, slow).items(), 1):
            if name == "WebRTC" and not isolated:
                continue
            page = page.replace("PORT", str(listener.port)).replace("FILE", str(secret))
            picture, after = renderer.render([page])[0], renderer.render([good(i)])[0]
            assert bool(picture.path) != bool(picture.refusal), name
            assert picture.path is None or not (pixels(picture) == (1, 254, 3)).all(-1).any(), name
            assert after.path.read_bytes() == expected, name
        tree = renderer.worker.tree()
    assert listener.heard == []
    assert list(home.iterdir()) == []
    assert len(tree) > 3 and no_process_of(tree)
    socket.create_connection(("127.0.0.1", listener.port)).close()  # the listener works
    deadline = time.time() + 5
    while not listener.heard and time.time() < deadline:
        time.sleep(0.01)
    assert listener.heard.pop() == "tcp"


@needs_browser
def test_refresh_leaves_the_page_as_it_is(renderer):
    body = "<body><h1>still here</h1></body></html>"
    refresh = '<meta http-equiv="refresh" content="0; url=about:blank">'
    plain, refreshed = renderer.render([f"<html>{body}", f"<html><head>{refresh}</head>{body}"])
    assert plain.path.read_bytes() == refreshed.path.read_bytes()


@needs_browser
@QUICK_AND_SLOW
def test_burdens(tmp_path, scripts_run, slow):
    with Renderer(tmp_path, deadline=20) as renderer:
        expected = renderer.render([good(0)])[0].path.read_bytes()
        for i, (name, page) in enumerate(some(BURDENS, slow).items(), 1):
            picture, after = renderer.render([page])[0], renderer.render([good(i)])[0]
            assert bool(picture.path) != bool(picture.refusal), name
            if picture.path:
                width, height = Image.open(picture.path).size
                assert width <= 2000 and height <= 10000
            assert after.path.read_bytes() == expected, name
        giant = renderer.render([BURDENS["a giant page"]])[0]
        assert Image.open(giant.path).size == (2000, 10000)
        refused = renderer.render(["<html>" + "x" * 3_000_000, None])
        assert "larger than 2000000 bytes" in refused[0].refusal and refused[1].refusal == "no page"


@needs_browser
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in HANGS])
def test_only_the_page_that_hangs_or_fills_the_memory_is_refused(tmp_path, request, name):
    if "script" in name:
        request.getfixturevalue("scripts_run")
    deadline = 40 if name == "a memory bomb" else 10  # seconds; a slow machine's browser takes 5
    with Renderer(tmp_path, tabs=2, deadline=deadline, memory=1.5e9) as renderer:
        tree = renderer.worker.tree()
        pictures = renderer.render([good(1), HANGS[name], good(2), good(3)])
        assert pictures[1].path is None
        by_parent = "longer than 10 seconds", "1.5 GB of memory", "the browser crashed"
        by_browser = "crashed", "Timeout", "closed"  # of the tab alone
        assert any(words in pictures[1].refusal for words in by_parent + by_browser)
        neighbours = [pictures[0], *pictures[2:]]
        assert [picture.refusal for picture in neighbours] == [None] * 3
        assert len({picture.path.read_bytes() for picture in neighbours}) == 1
        renderer.render([good(4)])
        if any(words in pictures[1].refusal for words in by_parent):
            assert renderer.restarts >= 1 and no_process_of(tree)
            tree = renderer.worker.tree()
    assert no_process_of(tree)


@needs_browser
def test_no_process_outlives_a_killed_parent(tmp_path):
    """The worker notices the end of its stdin."""
    import subprocess
    import sys
    code = ("import sys, time; from colbench.env.frontend.browser import Renderer\n"
            f"r = Renderer({str(tmp_path)!r})\n"
            "print(r.worker.process.pid, flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=browser.ROOT,
                              stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    tree = [worker, *worker.children(recursive=True)]
    assert len(tree) > 3
    parent.kill()
    parent.wait()
    assert no_process_of(tree)


def test_no_browser_names_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(browser, "NAMES", ("no-such-browser",))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    monkeypatch.delenv("COLBENCH_CHROMIUM", raising=False)
    with pytest.raises(UserError) as error:
        Renderer(tmp_path / "shots")
    message = str(error.value)
    assert "playwright install" in message and "apt-get install chromium" in message
    assert "\n" not in message
    monkeypatch.setenv("COLBENCH_CHROMIUM", "/no/such/program")
    with pytest.raises(UserError, match="/no/such/program"):
        Renderer(tmp_path / "shots")


@pytest.mark.slow
@needs_browser
def test_bundled_pages_are_all_different(renderer):
    pages = [compose(name, {}) for name in BUSINESSES]
    assert len({picture.path.read_bytes() for picture in renderer.render(pages)}) == len(pages)
