"""Pages, each with four candidates of growing distance: near, moderate, major edit, unrelated page.

Written by hand (`own`), or random edits of any pages (`edited`).
"""
import random
import re

SHEET = ('<link href="https://cdn.jsdelivr.net/npm/tailwindcss@2.2.19/dist/tailwind.min.css" '
         'rel="stylesheet">')
WORDS = ("We have served this town for many years and take the time to listen before we start . "
         "Ask us about prices and dates , or come by in the afternoon when the house is quiet and "
         "there is coffee for everybody").split()
MENU = "".join(f'<a class="px-4">{word}</a>' for word in ("Home", "About", "Prices", "Contact"))
SIDE = MENU.replace("px-4", "block py-2")


def text(n, start=0):
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(n))


def section(style, *inside, tag="section"):
    return f'<{tag} class="p-8 {style}">{"".join(inside)}</{tag}>'


def bar(style, links=MENU):
    return section(f"{style} text-white flex", links, tag="nav")


def foot(style, words="All rights reserved"):
    return section(f"{style} text-white text-center", words, tag="footer")


def hero(style, title, picture="", words=20):
    image = f'<img src="https://picsum.photos/id/48/{picture}">' if picture else ""
    return section(style, f'<h1 class="text-5xl font-bold">{title}</h1>',
                   f'<p class="py-4">{text(words)}</p>', image)


def cards(style, n, columns, title="Offer", words=14):
    return section(f"grid grid-cols-{columns} gap-6", *(
        f'<div class="{style} p-6 rounded"><h2 class="text-xl font-bold">{title} {i + 1}</h2>'
        f'<p>{text(words, 5 * i)}</p></div>' for i in range(n)))


def table(style, rows, columns=4):
    row = "".join(f'<td class="border p-2">{text(2, 3 * i)}</td>' for i in range(columns))
    return section("", f'<table class="w-full {style}">', f"<tr>{row}</tr>" * rows, "</table>")


def form(style, fields, button="bg-blue-600"):
    return section("", f'<form class="{style} p-6 w-1/2 mx-auto">', *(
        f'<input class="block w-full border-2 p-3 my-3" placeholder="{text(2, i)}">'
        for i in range(fields)),
        f'<button class="{button} text-white px-6 py-3">Send</button></form>')


def article(paragraphs, style="text-lg"):
    return section(f"max-w-4xl mx-auto {style}", *(
        f'<p class="py-3">{text(60, 7 * i)}</p>' for i in range(paragraphs)))


def gallery(n, columns, size="400/300"):
    return section(f"grid grid-cols-{columns} gap-4", *(
        f'<img class="w-full" src="https://picsum.photos/id/{48 + 3 * i}/{size}">'
        for i in range(n)))


def chart(style, *widths):
    return section("", *(f'<div class="{style} h-8 my-3 w-{w}/12"></div>' for w in widths))


def side(style, *blocks):
    return (f'<div class="flex"><aside class="{style} w-64 p-6">{SIDE}</aside>'
            f'<main class="flex-1">{"".join(blocks)}</main></div>')


def questions(n, words=50):
    return section("", *(f'<h2 class="text-2xl font-bold">{text(6, 4 * i)}</h2>'
                         f'<p class="pb-6">{text(words, i)}</p>' for i in range(n)))


def page(style, blocks):
    return "\n".join([f'<html>\n{SHEET}\n<body class="{style}">', *blocks, "</body>\n</html>"])


DARK = "bg-gray-900 text-white"
PLAN = "bg-white shadow text-center"
SALES, BARS = cards("bg-gray-700", 4, 4, "Sales", 3), chart("bg-blue-500", 9, 7, 11, 4)
# name: (style, blocks, near edit, moderate edit, blocks of the major edit)
# An edit is {index: block}; the index 1.5 inserts a block after block 1.
OWN = {
    "shop": (
        "",
        [bar("bg-indigo-800"), hero("", "Fresh bread", "1200/300"), cards("border-2", 3, 3),
         foot("bg-gray-400")],
        {1: hero("", "Warm bread", "1200/300"), 3: foot("bg-gray-500")},
        {1: hero("", "Fresh bread", "800/300"), 2: cards("border-2", 4, 2)},
        [bar("bg-red-700"), cards("border-2", 4, 1), hero("text-right", "Fresh bread", "600/300")]),
    "dark dashboard": (
        DARK, [side("bg-black", SALES, BARS, table("bg-gray-800", 8))],
        {0: side("bg-black", SALES, chart("bg-blue-500", 9, 8, 10, 4), table("bg-gray-800", 8))},
        {0: side("bg-black", SALES, table("bg-gray-800", 8), chart("bg-green-500", 9, 7))},
        [bar("bg-blue-700"), cards("bg-gray-500", 4, 2, "Sales", 3), table("bg-gray-800", 4)]),
    "sparse": (
        "", [hero("text-center mt-64", "Lumen Studio", words=3)],
        {0: hero("text-center mt-64", "Lumen Studios", words=2)},
        {0: hero("text-left mt-64 bg-gray-100", "Lumen Studio", words=3)},
        [bar("bg-gray-400"), hero("", "Lumen Studio"), article(4)]),
    "long article": (
        "bg-gray-50",
        [hero("text-center", "A town and its river", "900/400"), article(25), foot("bg-black")],
        {0: hero("text-center", "A river and its town", "900/400"), 1: article(24)},
        {0: hero("text-center", "A town and its river"), 2: cards("bg-blue-100", 3, 3)},
        [hero("bg-blue-100", "A town and its river", "400/400"), article(13, "text-sm"),
         foot("bg-red-800"), cards("bg-blue-100", 6, 2)]),
    "table": (
        "", [hero("bg-green-700 text-white", "Time table"), table("", 24, 6)],
        {0: hero("bg-green-600 text-white", "Time table"), 1: table("", 25, 6)},
        {0.5: bar("bg-green-400")},
        [hero("bg-blue-700 text-white", "Time table", "300/100"), cards("border-2", 6, 3),
         table("", 8, 3)]),
    "form": (
        "bg-blue-50", [bar("bg-blue-900"), form("bg-white", 6), foot("bg-blue-900")],
        {1: form("bg-white", 6, "bg-green-600"), 2: foot("bg-blue-900", "All rights")},
        {1: form("bg-gray-200", 4), 1.5: cards("bg-white", 3, 3)},
        [hero("bg-pink-600 text-white", "Write"), form("bg-gray-200", 3, "bg-pink-600"), article(2),
         foot("bg-pink-600")]),
    "gallery": (
        "bg-black text-white", [hero("text-center", "Pictures"), gallery(12, 4)],
        {0: hero("text-center", "My pictures"), 1: gallery(12, 4, "400/310")},
        {1: gallery(9, 3, "400/200"), 2: foot("bg-gray-700")},
        [bar("bg-gray-700"), gallery(4, 2, "400/200"), article(3)]),
    "landing": (
        "",
        [hero("bg-purple-600 text-white text-center", "Ship faster", "900/300"),
         cards("bg-gray-100", 6, 3), hero("bg-purple-700 text-white", "Start now"),
         foot("bg-gray-900")],
        {0: hero("bg-purple-600 text-white text-center", "Ship it faster", "900/300"),
         2: hero("bg-purple-700 text-white", "Start today")},
        {0: hero("bg-green-600 text-white text-center", "Ship faster", "900/300"),
         1: cards("bg-gray-100", 3, 3)},
        [hero("bg-purple-700 text-white", "Start now"), table("", 5), cards("bg-gray-100", 2, 1),
         hero("bg-green-500 text-white", "Ship faster", "900/300")]),
    "blog": (
        "bg-yellow-50",
        [bar("bg-yellow-700"), side("bg-yellow-200", article(5), gallery(2, 2), article(4))],
        {1: side("bg-yellow-300", article(5), gallery(2, 2), article(5))},
        {1: side("bg-yellow-200", gallery(3, 3), article(5))},
        [bar("bg-green-700"), article(3), cards("bg-yellow-200", 4, 2), gallery(2, 2),
         foot("bg-green-700")]),
    "dense": (
        "text-sm",
        [bar("bg-gray-800", MENU * 2), cards("bg-gray-100", 24, 6, "Part", 10), table("", 10, 8)],
        {1: cards("bg-gray-100", 24, 6, "Unit", 10), 2: table("", 11, 8)},
        {0.5: hero("bg-gray-100", "Parts")},
        [bar("bg-green-700"), table("", 20, 4), cards("bg-gray-100", 8, 4, "Part", 30)]),
    "picture across": (
        "bg-gray-100", [gallery(1, 1, "1300/600"), cards("bg-white", 2, 2), foot("bg-gray-800")],
        {0: gallery(1, 1, "1300/620"), 2: foot("bg-gray-700")},
        {-1: cards("bg-white", 2, 2), 1: ""},
        [bar("bg-red-600"), cards("bg-white", 6, 3), gallery(2, 2, "600/500")]),
    "prices": (
        "bg-gray-200",
        [hero("text-center", "Prices"), cards(PLAN, 3, 3, "Plan", 40), foot("bg-indigo-600")],
        {0: hero("text-center", "Our prices"), 1: cards(PLAN, 3, 3, "Plan", 44)},
        {0: hero("text-center bg-indigo-600 text-white", "Prices"),
         1.5: cards("bg-white", 2, 2, "Question")},
        [bar("bg-gray-400"), hero("", "Prices", "700/100"), table("bg-white", 8),
         foot("bg-red-600")]),
    "calendar": (
        "", [bar("bg-red-500", "May"), cards("border-2 h-32", 35, 7, "", 2)],
        {0: bar("bg-red-600", "May"), 1: cards("border-2 h-32", 35, 7, "", 3)},
        {0.5: hero("", "My month", words=8)},
        [hero("bg-blue-500 text-white", "May"), cards("border-2", 15, 3, "", 6),
         foot("bg-blue-500")]),
    "questions": (
        "bg-green-50", [hero("text-center", "Questions"), questions(8), foot("bg-green-900")],
        {1: questions(8, 54), 2: foot("bg-green-800")},
        {0: hero("text-left", "Questions", "300/100"), 1: questions(5)},
        [bar("bg-green-900"), cards("bg-white", 8, 2, "Question", 30),
         hero("bg-green-900 text-white", "Questions")]),
}


def own() -> list:
    """[(page, [near, moderate, major, unrelated]), ...], in the order of OWN."""
    pages = [page(style, blocks) for style, blocks, *_ in OWN.values()]
    result = []
    for i, (style, blocks, near, moderate, major) in enumerate(OWN.values()):
        candidates = []
        for edit in (near, moderate):
            places = dict(enumerate(blocks)) | edit
            candidates.append(page(style, [places[place] for place in sorted(places)]))
        candidates += [page(style, major), pages[i - 5]]
        result.append((pages[i], candidates))
    return result


# ------------------------------------------------------------------------------------- random edits

HUES = ("gray", "red", "yellow", "green", "blue", "indigo", "purple", "pink")
HUE = rf"\b(bg|text|border)-({'|'.join(HUES)})-(\d00)\b"
BLOCK = (r"<(section|article|ul|ol|nav|header|footer|form|table|figure|p|h1|h2|h3|li|button)\b"
         r"[^>]*>(?:(?!<\1\b).)*?</\1>|<img[^>]*>")


def edited(pages, seed=0):
    """As `own`, by random edits.

    near: one small change; moderate: two visible changes; major: seven of them, and about every
    third colour changed.
    """
    result = []
    for i, original in enumerate(pages):
        rng = random.Random(f"{seed} {i}")
        near = moderate = major = original
        while near == original:
            near = rng.choice((shade, reword, pad))(near, rng)
        while moderate in (original, near):
            for change in rng.sample((drop, double, hue, swap, banner), 2):
                moderate = change(moderate, rng)
        for change in (drop, drop, drop, double, swap, swap, hue, recolour):
            major = change(major, rng)
        unrelated = pages[(i + rng.randrange(1, len(pages))) % len(pages)]
        result.append((original, [near, moderate, major, unrelated]))
    return result


def one(pattern, page, rng, new):
    """The page with one match of the pattern replaced by `new` of it."""
    start = page.find("<body")
    found = list(re.finditer(pattern, page[start:], re.DOTALL))
    if not found:
        return page
    m = rng.choice(found)
    return page[:start + m.start()] + new(m) + page[start + m.end():]


def shade(page, rng):
    return one(HUE, page, rng, lambda m: f"{m[1]}-{m[2]}-{int(m[3]) % 900 + 100}")


def reword(page, rng):
    def new(m):
        words = m[1].split()
        return f">{' '.join(rng.sample(words, len(words))[1:])}<"
    return one(r">([^<>]{8,})<", page, rng, new)


def pad(page, rng):
    return one(r"\b([pm][xytblr]?)-([2-8])\b", page, rng, lambda m: f"{m[1]}-{int(m[2]) + 2}")


def drop(page, rng):
    return one(BLOCK, page, rng, lambda m: "")


def double(page, rng):
    return one(BLOCK, page, rng, lambda m: m[0] * 2)


def banner(page, rng):
    style, height = f"bg-{rng.choice(HUES)}-{rng.choice('1357')}00", rng.choice((60, 120, 200))
    block = f'<div class="{style}" style="height:{height}px"></div>'
    return re.sub("<body[^>]*>", lambda m: m[0] + block, page)


def hue(page, rng):
    old = rng.choice([m[2] for m in re.finditer(HUE, page) if m[1] == "bg"] or HUES)
    new = rng.choice(HUES)
    return page.replace(f"bg-{old}-", f"bg-{new}-")


def recolour(page, rng):
    def new(m):
        return f"{m[1]}-{rng.choice(HUES)}-{m[3]}" if rng.random() < 0.3 else m[0]
    return re.sub(HUE, new, page)


def swap(page, rng):
    found = list(re.finditer(BLOCK, page, re.DOTALL))
    pairs = [(a, b) for a, b in zip(found, found[1:]) if a.end() <= b.start()]
    if not pairs:
        return page
    a, b = rng.choice(pairs)
    return page[:a.start()] + b[0] + page[a.end():b.start()] + a[0] + page[b.end():]
