"""What a page may ask for, answered without a network: Tailwind's files, and placeholder pictures at the asked size."""
import hashlib
import html
import lzma
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ASSETS = Path(__file__).parent / "assets"
SHA256 = {
    "tailwind-2.2.19.css": "b6ad97402eddb903e7a5d7a73ee47a679204efbdda4521a391cbad9df509b932",
    "tailwind-play-3.4.10.js": "2f0570ef81afaa4194fa4ffe80fb291971f0ce27cecd0a1100fdcb4865703364",
    "tailwind-browser-4.3.4.js": "e54f393a8f716e47e9e21b916e934d42793dfb6ed65988583dcc3456dcb012aa",
}
SHEET = re.compile(r"tailwind[^?#]*\.css", re.IGNORECASE)  # any version gets 2.2.19, the one published pages link
PLAY = re.compile(r"(https?:)?//cdn\.tailwindcss\.com\b|"
                  r"(https?:)?//[^\s\"'<>]*(@tailwindcss/browser|tailwindcss-browser|tailwindcss-cdn)",
                  re.IGNORECASE)
ESCAPE = re.compile(r"\\(?:([0-9a-f]{1,6})\s?|(.))")  # \32xl is the class 2xl, \: a colon
LARGEST_SIDE = 4096  # px; a page may ask for a picture of 100,000 by 100,000


@lru_cache
def asset(name: str) -> str:
    """The text of one of Tailwind's files, checked against its SHA-256."""
    content = lzma.decompress((ASSETS / f"{name}.xz").read_bytes())
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ValueError(f"{ASSETS / name}.xz: not the published file (SHA-256 differs); "
                         "check out the repository again")
    return content.decode()


def play_script(url: str) -> str | None:
    """The Tailwind script that builds its sheet in the browser (v3 and v4 style) which `url` asks for, or None."""
    if not PLAY.match(url):
        return None
    return asset("tailwind-browser-4.3.4.js" if "browser" in url.lower() else "tailwind-play-3.4.10.js")


def needs_scripts(page: str) -> bool:
    """Whether the page links one of Tailwind's scripts, without which it has no style. Comments do not count."""
    page = re.sub(r"<!--.*?(-->|$)", "", page, flags=re.DOTALL)
    sources = re.findall(r"<script\b[^>]*?\bsrc\s*=\s*[\"']?([^\"'\s>]+)", page, re.IGNORECASE)
    return any(PLAY.match(source) for source in sources)


# ------------------------------------------------------------------------------------------------------- style sheet


@lru_cache
def sheet_items() -> list:
    """The sheet as [(media query or None, text of the rule, class names it needs: list of frozensets)], in order."""
    items = []
    for prelude, body in _rules(asset("tailwind-2.2.19.css")):
        if prelude.startswith("@media"):
            items += [(prelude, f"{inner}{{{text}}}", _classes(inner)) for inner, text in _rules(body)]
        else:
            items.append((None, f"{prelude}{{{body}}}", [] if prelude.startswith("@") else _classes(prelude)))
    return items


def _rules(text: str):
    """(prelude, body) of each rule at the top level of a minified sheet."""
    depth, start, opened = 0, 0, 0
    for found in re.finditer(r"/\*.*?\*/|\\.|[{}]", text, re.DOTALL):
        token = found.group()
        if token == "{":
            depth += 1
            if depth == 1:
                opened = found.start()
        elif token == "}":
            depth -= 1
            if depth == 0:
                prelude = re.sub(r"/\*.*?\*/", "", text[start:opened], flags=re.DOTALL)
                yield prelude, text[opened + 1:found.start()]
                start = found.end()


def _classes(selectors: str) -> list:
    """For each selector of a list, the classes an element (or its parent) must have; [] if one of them needs none."""
    needed = []
    for selector in re.split(r"(?<!\\),", selectors):
        names = re.findall(r"\.((?:\\[0-9a-f]{1,6}\s?|\\.|[\w-])+)", selector)
        if not names:
            return []
        needed.append(frozenset(re.sub(ESCAPE, _unescaped, name).lower() for name in names))
    return needed


def _unescaped(found):
    return chr(int(found[1], 16)) if found[1] else found[2]


def tailwind_sheet(page: str) -> str:
    """The rules of Tailwind 2.2.19 whose classes occur in the page: 6 kB instead of 2.9 MB, and the same pixels.

    Only for pages whose scripts are off. Too many words are taken for classes rather than too few: character references
    are decoded as well, and case does not matter, as in the quirks mode that pages without a doctype run in.
    """
    words = set()
    for text in (page, html.unescape(page)):
        words.update(re.split(r"[\s\"'<>=]+", text.lower()))
    kept, media = [], None
    for query, rule, needed in sheet_items():
        if needed and not any(names <= words for names in needed):
            continue
        if query != media:
            kept.append(("}" if media else "") + (f"{query}{{" if query else ""))
            media = query
        kept.append(rule)
    return "".join(kept) + ("}" if media else "")


# ---------------------------------------------------------------------------------------------------------- pictures

PICTURE_HOSTS = re.compile(
    r"(^|\.)(picsum\.photos|unsplash\.(com|it)|placeholder\.com|placehold\.(co|it|jp)|place-hold\.it|"
    r"dummyimage\.com|placeimg\.com|loremflickr\.com|lorempixel\.com|placekitten\.com|fakeimg\.pl)$")


def placeholder(url: str) -> str | None:
    """An SVG picture of the size that `url` asks of a picture service, or None if it is no such URL.

    Sizes: the last two numbers of the path (`/id/48/640/480`, `/640x480`), one number for a square, `?w=…&h=…`; else
    640 x 480. Picture 48, which all published pages use, has fixed colours; others differ by what stands before the
    size.
    """
    parts = urlsplit(url)
    if not PICTURE_HOSTS.search(parts.hostname or ""):
        return None
    query = parse_qs(parts.query)
    path = re.sub(r"^/(id|seed)/[^/]+", "", parts.path)
    numbers = [int(number[:9]) for number in re.findall(r"(?<![\w#])\d+", path.replace("x", "/").replace("X", "/"))]
    if "w" in query or "width" in query or "h" in query:
        width, height = (next((int(v[:9]) for key in names for v in query.get(key, []) if v.isdigit()), None)
                         for names in (("w", "width"), ("h", "height")))
        width = width or height
        numbers = [width or 640, height or (width or 640) * 2 // 3]
    width, height = [640, 480] if not numbers else numbers * 2 if len(numbers) == 1 else numbers[:2]
    width, height = (min(max(side, 1), LARGEST_SIDE) for side in (width, height))
    name = re.match(r"/(?:id|seed)/([^/]+)", parts.path)
    return picture(width, height, name.group(1) if name else "48")


def picture(width: int, height: int, name: str = "48") -> str:
    """A landscape (sky, sun, hills) as SVG of exactly this size in px; the name chooses the colours."""
    hue = 210 if name == "48" else int(hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:4], 16) % 360
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 100 100" '
        f'preserveAspectRatio="none"><defs><linearGradient id="s" x2="0" y2="1"><stop stop-color="hsl({hue},45%,55%)"/>'
        f'<stop offset="1" stop-color="hsl({hue + 160},45%,80%)"/></linearGradient></defs>'
        f'<rect width="100" height="100" fill="url(#s)"/><circle cx="72" cy="28" r="9" fill="hsl(45,80%,85%)"/>'
        f'<path d="M0 70L25 42 45 66 64 48 100 76V100H0z" fill="hsl({hue + 20},25%,38%)"/>'
        f'<path d="M0 84L30 68 62 88 100 70V100H0z" fill="hsl({hue + 140},25%,28%)"/></svg>'
    )
