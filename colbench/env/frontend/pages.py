"""The bundled Frontend Design tasks: small business pages made from a seed, and a page language.

A page is a business (its texts) and seven details. The request names the business but no details:

    request      Bakery website: a warm, simple page for Miller's Bakery with a menu, ...
    hidden page  <html><link href=".../tailwindcss@2.2.19/..."> ... </html>,
                 for {"background": "blue", ...}

Agents that write HTML play these tasks like any others. The page language is for a tiny model
(`--page-language edits`): a message is a few lines such as `columns 3`, each setting one detail.
`expand` turns everything set so far into the page.

    python -m colbench.env.frontend.pages --split test --n 3      # look at some tasks
"""
import argparse
import hashlib
import html
import json
import random
import re

SIZES = {"train": 400, "test": 200}  # tasks in `pages:train` and `pages:test` without a limit
DETAILS = {  # detail -> its values, the default first
    "background": ("white", "gray", "blue", "yellow", "dark"),
    "menu": ("top", "left"),
    "headline": ("left", "centre", "right"),
    "picture": ("none", "left", "right", "wide"),
    "columns": ("1", "2", "3"),
    "button": ("blue", "red", "green"),
    "form": ("none", "three"),
}
BUSINESSES = {  # name of the business: (kind, tone, three things it offers)
    "Miller's Bakery":
      ("Bakery", "warm, simple", "Fresh bread", "Birthday cakes", "Morning coffee"),
    "Harbour Dental": ("Dentist", "calm, tidy", "Check-ups", "Whitening", "Children's visits"),
    "Northside Books":
      ("Bookshop", "quiet, classic", "New novels", "Rare editions", "Reading evenings"),
    "Green Wheel":
      ("Bicycle repair", "fresh, practical", "Quick repairs", "Rental bikes", "Winter storage"),
    "Stone & Vine":
      ("Restaurant", "cosy, elegant", "Seasonal menu", "Wine cellar", "Private dinners"),
    "Bright Minds":
      ("Tutoring school", "friendly, clear", "Maths lessons", "Language courses", "Exam practice"),
    "Summit Travel":
      ("Travel agency", "brave, open", "Mountain tours", "City weekends", "Sea journeys"),
    "Paws & Claws": ("Animal clinic", "gentle, honest", "Vaccinations", "Surgery", "Grooming"),
    "Clearwater Pools": ("Pool service", "clean, light", "Cleaning", "Heating", "New pools"),
    "Oak Hall": ("Wedding venue", "romantic, grand", "Ceremonies", "Banquets", "Garden parties"),
    "Fit Factory": ("Gym", "bold, direct", "Personal training", "Group classes", "Sauna"),
    "Lumen Studio": ("Photography", "modern, plain", "Portraits", "Product pictures", "Weddings"),
    "Riverside Law":
      ("Law firm", "serious, trustworthy", "Contracts", "Family matters", "Company law"),
    "Little Garden": ("Flower shop", "cheerful, small", "Bouquets", "Pot plants", "Deliveries"),
    "Old Town Hotel":
      ("Hotel", "classic, welcoming", "Quiet rooms", "Breakfast", "Conference hall"),
    "Spark Electric":
      ("Electrician", "quick, reliable", "Wiring", "Solar panels", "Emergency calls"),
}
SHEET = "https://cdn.jsdelivr.net/npm/tailwindcss@2.2.19/dist/tailwind.min.css"
BACKGROUND = {"white": "bg-white", "gray": "bg-gray-200", "blue": "bg-blue-200",
              "yellow": "bg-yellow-100", "dark": "bg-gray-800 text-white"}
PLACE = {"left": "text-left", "centre": "text-center", "right": "text-right"}
BUTTON = {"blue": "bg-blue-600", "red": "bg-red-600", "green": "bg-green-600"}


def compose(business: str, details: dict) -> str:
    """The page of a business with these details; missing ones have their first value."""
    d = {name: details.get(name, values[0]) for name, values in DETAILS.items()}
    kind, tone, *offers = BUSINESSES[business]
    name = html.escape(business)
    on_top = d["menu"] == "top"
    link_style, menu_style = ("px-4", "p-4") if on_top else ("block py-2", "p-6 w-64")
    links = "".join(f'<a href="#" class="{link_style}">{text}</a>'
                    for text in ("Home", "About us", "Offers", "Contact"))
    menu = f'<nav class="bg-indigo-800 text-white {menu_style}">{links}</nav>'
    size = "1200/400" if d["picture"] == "wide" else "400/300"
    picture = f'<img src="https://picsum.photos/id/48/{size}">'
    heading = f'<h1 class="text-5xl font-bold {PLACE[d["headline"]]}">Welcome to {name}</h1>'
    text = (f'<p class="py-4">{name} is a {tone} place run by people who like what they do. '
            f'We have served this town for many years, and we take the time to listen before we '
            f'start.</p>'
            f'<button class="{BUTTON[d["button"]]} text-white px-6 py-3">Get in touch</button>')
    text_and_picture = {
        "none": text,
        "wide": text + f'<div class="py-6">{picture}</div>',
        "left": f'<div class="flex py-6">{picture}<div class="pl-8">{text}</div></div>',
        "right": (f'<div class="flex py-6 justify-between"><div class="pr-8">{text}</div>{picture}'
                  '</div>'),
    }[d["picture"]]
    cards = "".join(f'<div class="border-2 p-6"><h2 class="text-xl font-bold">{offer}</h2>'
                    f'<p>Ask us about {offer.lower()}: we find what suits you and tell you the '
                    f'price before we begin.</p></div>' for offer in offers)
    grid = f'<div class="grid grid-cols-{d["columns"]} gap-6">{cards}</div>'
    form = ""
    if d["form"] != "none":
        fields = "".join(f'<input class="block border-2 p-2 my-2 w-96" placeholder="{label}">'
                         for label in ("Your name", "Your address", "Your wish"))
        form = f'<section class="p-8">{fields}</section>'
    body = (f'<section class="p-8">{heading}{text_and_picture}</section>'
            f'<section class="p-8">{grid}</section>{form}')
    if on_top:
        whole = f"{menu}<main>{body}</main>"
    else:
        whole = f'<div class="flex">{menu}<main class="flex-1">{body}</main></div>'
    return (f'<html>\n<link href="{SHEET}" rel="stylesheet">\n'
            f'<body class="{BACKGROUND[d["background"]]}">\n{whole}\n'
            f'<footer class="bg-gray-600 text-white p-6 text-center">{name}, {kind.lower()} '
            'in the old town</footer>\n</body>\n</html>')


def request(business: str) -> str:
    """The vague request that the agent sees."""
    kind, tone, *_ = BUSINESSES[business]
    return (f"{kind} website: a {tone} page for {business} with a menu, a headline, what we offer, "
            "and a footer.")


def page_task(split: str, index: int, seed: int = 0) -> dict:
    """Task number `index` of a split, always the same. A page's content decides its split."""
    rng = random.Random(f"pages {split} {seed} {index}")
    while True:
        business = rng.choice(list(BUSINESSES))
        details = {name: rng.choice(values) for name, values in DETAILS.items()}
        in_test = hashlib.sha256(json.dumps([business, details]).encode()).digest()[0] < 64
        if in_test == (split == "test"):
            break
    return {"id": f"pages-{split}-{seed}-{index}", "problem_description": request(business),
            "ground_truth": compose(business, details)}


def page_tasks(split: str, n: int, seed: int = 0) -> list:
    """The first n tasks of a split ("train" or "test") in the published format."""
    return [page_task(split, index, seed) for index in range(n)]


def edits(message: str) -> dict:
    """{detail: value} set by a message in the page language; the last line of a detail counts."""
    details = {}
    for name, value in re.findall(r"^[ \t]*(\w+)[ \t:]+(\w+)[ \t]*$", message, re.MULTILINE):
        if value in DETAILS.get(name, ()):
            details[name] = value
    return details


def expand(history: list) -> str | None:
    """The page that a dialogue in the page language has built, or None if nothing was set yet.

    history: [{"role", "content"}, ...]; the first message is the request and names the business.
    """
    named = [name for name in BUSINESSES if name in history[0]["content"]]
    business = named[0] if named else next(iter(BUSINESSES))
    details = {}
    for message in history:
        if message["role"] == "assistant":
            details |= edits(message["content"])
    return compose(business, details) if details else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SIZES, default="train")
    parser.add_argument("--n", type=int, default=3, help="number of tasks (default: 3)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed gives different tasks (default: 0)")
    args = parser.parse_args()
    for task in page_tasks(args.split, args.n, args.seed):
        print(json.dumps(task))
