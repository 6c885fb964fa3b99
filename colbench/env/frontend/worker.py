"""The child process that renders: one Chromium, driven by Playwright; colbench.env.frontend.browser watches over it.

Reads requests, a JSON object a line, {"number", "page", "layout"}, from stdin; writes {"number", "png" (base64) |
"refusal", "layout"} to stdout in the order in which they are done. The first line it writes is {"browser",
"executable"} or {"failed"}.
What the page may do is limited here: every request is answered from colbench.env.frontend.resources or refused, scripts
are off (on for pages that need one of Tailwind's scripts, which alone then runs, with the settings that
colbench.env.frontend.configuration reads), later navigations, frames, popups, downloads, dialogs and service workers
are refused. That a page cannot hang, fill the memory or reach a network is the parent's business.
"""
import asyncio
import json
import os
import signal
import sys
import threading

import psutil
from playwright.async_api import Error, async_playwright

from colbench.env.frontend.configuration import configured
from colbench.env.frontend.layout import LAYOUT
from colbench.env.frontend.resources import SHEET, asset, needs_scripts, placeholder, play_script, tailwind_sheet

VIEWPORT = {"width": 1366, "height": 768}  # headless Firefox's default window, in which the released code renders
LARGEST = (2000, 10000)  # px, width and height of a picture; a page may ask for 60,000 x 100,000
STEP_S = 20  # seconds for one step of a rendering, ample on a loaded machine; the parent's deadline stands above it
FLAGS = (
    "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb", "--font-render-hinting=none",
    "--disable-lcd-text", "--mute-audio",
    "--disable-partial-raster", "--disable-checker-imaging",  # without these two, 2 renderings in 18 differed
    "--blink-settings=imageAnimationPolicy=2",  # animated pictures stand still
    "--host-resolver-rules=MAP * ~NOTFOUND", "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--disable-background-networking", "--disable-component-update", "--no-first-run",
)
SETTLE = """() => {
    const sheet = new CSSStyleSheet();
    sheet.replaceSync("* { caret-color: transparent !important }");
    document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
    for (const m of document.querySelectorAll("marquee")) {  // it moves by means that cannot be stopped somewhere
        const still = document.createElement("div");
        still.className = m.className;
        still.append(...m.childNodes);
        m.replaceWith(still);
    }
    for (const a of document.getAnimations()) try { a.finish() } catch { a.cancel() }  // an endless one: to its start
    for (const svg of document.querySelectorAll("svg")) { svg.pauseAnimations(); svg.setCurrentTime(0) }
}"""


class Refused(Exception):
    """Why a page is not rendered, in a few words."""


def policy(scripts: bool, inline: list = ()) -> str:
    """The Content-Security-Policy of a page. Of its scripts only Tailwind's runs, and the inline ones named here."""
    source = " ".join(["https:", "http:", "'unsafe-hashes'", *inline]) if scripts else "'none'"
    return (f"default-src 'none'; script-src {source}; style-src 'unsafe-inline' https: http:; "
            "img-src https: http: data:; font-src https: http: data:; frame-src 'none'; object-src 'none'; "
            "base-uri 'none'; form-action 'none'; sandbox" + (" allow-scripts" if scripts else ""))


class Tab:
    """One tab; `render` draws one page after the other in it. After a failure it is closed and opened anew."""

    def __init__(self, browser, site):
        self.site = site  # tabs of one site would share a process, and a page that hangs would hold up its neighbour
        self.browser, self.context, self.tab, self.scripts = browser, None, None, None

    async def render(self, number: int, page: str, want_layout: bool) -> dict:
        """{"png", "layout"} of a page; Refused where it cannot be drawn."""
        scripts = needs_scripts(page)
        if self.tab is None or scripts or self.scripts:  # a page that ran a script leaves nothing to the next one
            await self.open(scripts)
        self.address, self.page, self.served, self.sheet = f"http://{self.site}.invalid/{number}", page, False, None
        try:
            await self.tab.goto(self.address, wait_until="load", timeout=STEP_S * 1000)
            if scripts:
                await self.tab.wait_for_timeout(200)  # the script writes its sheet after `load`
            await self.tab.evaluate("() => document.fonts.ready.then(() => 0)")
            await self.tab.evaluate(SETTLE)
            layout = await self.tab.evaluate(LAYOUT) if want_layout else None
            size = (await self.session.send("Page.getLayoutMetrics"))["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": min(max(size["width"], VIEWPORT["width"]), LARGEST[0]),
                    "height": min(max(size["height"], VIEWPORT["height"]), LARGEST[1]), "scale": 1}
            shot = await self.session.send("Page.captureScreenshot",
                                           {"format": "png", "clip": clip, "captureBeyondViewport": True})
            return {"png": shot["data"], "layout": layout}
        except Error as error:
            await self.close()
            raise Refused(str(error).strip().split("\n")[0][:200]) from None

    async def open(self, scripts: bool) -> None:
        """A fresh tab in a context of its own."""
        await self.close()
        self.context = await self.browser.new_context(
            viewport=VIEWPORT, device_scale_factor=1, java_script_enabled=scripts, locale="en-US", timezone_id="UTC",
            color_scheme="light", reduced_motion="reduce", accept_downloads=False, service_workers="block")
        self.context.set_default_timeout(STEP_S * 1000)
        await self.context.route("**/*", self.answer)
        self.tab = await self.context.new_page()
        self.tab.on("dialog", lambda dialog: _ignore(dialog.dismiss()))
        self.context.on("page", lambda popup: _ignore(popup.close()) if popup != self.tab else None)
        self.session = await self.context.new_cdp_session(self.tab)
        self.scripts = scripts

    async def close(self) -> None:
        """Close the tab, if there is one."""
        context, self.context, self.tab = self.context, None, None
        if context:
            await context.close()

    async def answer(self, route) -> None:
        """Every request of the page comes here."""
        url = route.request.url
        try:
            if route.request.is_navigation_request():
                if route.request.frame.parent_frame is None and url == self.address and not self.served:
                    self.served = True
                    page, inline = configured(self.page) if self.scripts else (self.page, [])
                    await route.fulfill(status=200, body=page.encode("utf-8", "replace"), headers={
                        "content-type": "text/html; charset=utf-8", "cache-control": "no-store",
                        "content-security-policy": policy(self.scripts, inline)})
                elif route.request.frame.parent_frame is None:
                    await route.fulfill(status=204)  # the page stays as it is
                else:
                    await route.abort("blockedbyclient")
            elif SHEET.search(url):
                if self.sheet is None:
                    self.sheet = asset("tailwind-2.2.19.css") if self.scripts else tailwind_sheet(self.page)
                await route.fulfill(status=200, body=self.sheet, content_type="text/css")
            elif self.scripts and play_script(url):
                await route.fulfill(status=200, body=play_script(url), content_type="text/javascript",
                                    headers={"access-control-allow-origin": "*"})
            elif svg := placeholder(url):
                await route.fulfill(status=200, body=svg, content_type="image/svg+xml")
            else:
                await route.abort("blockedbyclient")
        except Error:
            pass  # the page went away in the meantime


def _ignore(coroutine):
    async def run():
        try:
            await coroutine
        except Error:
            pass
    asyncio.ensure_future(run())


def kill_descendants() -> None:
    """Kill everything below this process, again until nothing is left: what forks meanwhile is found the next time."""
    me = psutil.Process()
    while found := [process for process in me.children(recursive=True) if is_alive(process)]:
        for process in found:
            try:
                process.kill()
            except psutil.Error:
                pass


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; it may be gone since it was listed."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def read_requests(loop, queue) -> None:
    """Runs in a thread, so that the end of stdin (the parent is gone) ends everything even while a page hangs."""
    try:
        for line in sys.stdin.buffer:
            loop.call_soon_threadsafe(queue.put_nowait, json.loads(line))
        kill_descendants()
    finally:
        os._exit(0)


def say(row: dict) -> None:
    """Write a line to the parent."""
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


async def main(executable: str, tabs: int) -> None:
    """Start the browser, then render what stdin asks for until it ends."""
    queue = asyncio.Queue()
    threading.Thread(target=read_requests, args=(asyncio.get_running_loop(), queue), daemon=True).start()
    async with async_playwright() as playwright:
        own = playwright.chromium.executable_path
        executable = executable or (own if os.path.exists(own) else "")
        if not executable:
            return say({"failed": "no browser"})
        # Chromium as root works only without its own sandbox; the parent says so
        try:
            browser = await playwright.chromium.launch(
                executable_path=executable, args=[*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])],
                chromium_sandbox=os.geteuid() != 0)
        except Error as error:
            lines = [line for line in str(error).split("\n") if line.strip()]
            return say({"failed": " ".join(lines[:2] + [x for x in lines if "sandbox" in x.lower()][:1])[:300]})
        say({"browser": browser.version, "executable": executable})

        async def work(number):
            tab = Tab(browser, f"page{number}")
            while True:
                request = await queue.get()
                try:
                    done = await tab.render(request["number"], request["page"], request["layout"])
                except Refused as refused:
                    done = {"refusal": str(refused)}
                say({"number": request["number"]} | done)
        await asyncio.gather(*(work(number) for number in range(tabs)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes our stdin
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
