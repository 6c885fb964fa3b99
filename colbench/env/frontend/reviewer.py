"""The scripted reviewer: compares the layouts of two pages and says in plain words what differs.

It sees only what colbench.env.frontend.layout measures: no HTML, no class names. It uses no model,
so the same pages always get the same sentences.
"""
import colorsys
from difflib import SequenceMatcher

SAME = "This looks just like what I had in mind."
NOTHING = "I can't see any page yet. Please show me one."


def review(shown: dict | None, wanted: dict, most: int = 3) -> str:
    """What a person who wants the hidden page says about the agent's: at most `most` differences.

    shown, wanted: the layouts of the two pages; shown is None if the agent showed no page.
    """
    if shown is None:
        return NOTHING
    heaviest = differences(shown, wanted)[:most]
    return " ".join(sentence for _, sentence in heaviest) or SAME


def differences(shown: dict, wanted: dict) -> list:
    """[(weight, sentence), ...], the heaviest first; equal weights in the order of the checks."""
    found = []

    def note(weight, sentence):
        found.append((weight, sentence))

    if wanted["letters"] and not shown["letters"] and not shown["bands"]:
        return [(30, "Your page is empty.")]
    if (d := distance(shown["background"], wanted["background"])) > 6:
        background = shade(wanted["background"], shown["background"])
        note(min(14, 6 + d / 8), f"The page background should be {background}.")
    _headline(shown, wanted, note)
    _pictures(shown["pictures"], wanted["pictures"], wanted["width"], note)
    _bands(shown, wanted, note)
    for key, one in (("fields", "input field"), ("buttons", "button"), ("tables", "table")):
        _count(len(shown[key]), len(wanted[key]), one, 7, note)
    _buttons(shown["buttons"], wanted["buttons"], note)
    if len(shown["tables"]) == len(wanted["tables"]):
        for a, b in zip(shown["tables"], wanted["tables"]):
            if a["rows"] != b["rows"]:
                note(5, f"The table should have {number(b['rows'], 'row')}, not {a['rows']}.")
    _count(shown["links"], wanted["links"], "link", 3, note)
    if None not in (shown["serif"], wanted["serif"]) and shown["serif"] != wanted["serif"]:
        font = "classic serif font" if wanted["serif"] else "plain font without serifs"
        note(6, f"The text should be in a {font}.")
    if shown["text"] and wanted["text"]:
        if distance(shown["text"]["color"], wanted["text"]["color"]) > 20:
            color = shade(wanted["text"]["color"], shown["text"]["color"])
            note(3, f"The body text should be {color}.")
        if not 0.8 < wanted["text"]["size"] / shown["text"]["size"] < 1.25:
            larger = wanted["text"]["size"] > shown["text"]["size"]
            note(3, f"The body text should be {'larger' if larger else 'smaller'}.")
    if not found:  # finer things only if nothing else differs
        if not 0.75 < (wanted["letters"] + 20) / (shown["letters"] + 20) < 1.33:
            amount = "more" if wanted["letters"] > shown["letters"] else "less"
            note(2, f"There should be {amount} text on the page.")
        if abs(wanted["height"] - shown["height"]) > 0.04 * wanted["height"]:
            taller = wanted["height"] > shown["height"]
            length, room = ("longer", "more") if taller else ("shorter", "less")
            note(2, f"The page should be {length}, with {room} room between its parts.")
    weights = {}
    for weight, sentence in found:
        weights.setdefault(sentence, weight)  # of equal sentences the first counts
    return sorted(((weight, sentence) for sentence, weight in weights.items()),
                  key=lambda difference: -difference[0])


def _headline(shown, wanted, note):
    a, b = shown["headline"], wanted["headline"]
    if not b:
        return
    if not a:
        return note(10, f"There should be a headline, \"{b['text']}\".")
    if SequenceMatcher(None, a["text"].lower(), b["text"].lower()).ratio() < 0.7:
        note(8, f"The headline should read \"{b['text']}\".")
    if a["place"] != b["place"]:
        note(8, f"The headline should be {_placed(b['place'])}, not {_placed(a['place'])}.")
    growth = b["size"] / a["size"]
    if not 0.8 < growth < 1.25:
        much = "" if 0.5 < growth < 2 else "much "
        note(6, f"The headline should be {much}{'larger' if b['size'] > a['size'] else 'smaller'}.")
    if distance(a["color"], b["color"]) > 20:
        note(5, f"The headline should be {shade(b['color'], a['color'])}.")


def _placed(place: str) -> str:
    return "centred" if place == "centre" else f"on the {place}"


def _pictures(shown, wanted, width, note):
    if len(shown) != len(wanted):
        if len(wanted) == 1:
            if shown:
                return note(9, f"There should be one picture, not {len(shown)}.")
            middle = (wanted[0]["x"] + wanted[0]["w"] / 2) / width
            if wanted[0]["w"] > 0.6 * width:
                place = "over the whole width"
            elif middle < 0.4:
                place = "on the left"
            else:
                place = "on the right" if middle > 0.6 else "in the middle"
            return note(11, f"There should be one picture, {place}.")
        return _count(len(shown), len(wanted), "picture", 9, note)
    for i, (a, b) in enumerate(zip(shown, wanted)):
        name = "The picture" if len(wanted) == 1 else f"The {ordinal(i)} picture"
        grown = (b["w"] * b["h"]) / max(1, a["w"] * a["h"])
        if not 0.77 < grown < 1.3:
            note(min(9, 4 + 12 * abs(b["w"] * b["h"] - a["w"] * a["h"]) / (width * 768)),
                 f"{name} should be {'larger' if grown > 1 else 'smaller'}.")
        elif not 0.8 < (b["w"] / b["h"]) / (a["w"] / a["h"]) < 1.25:
            wider = b["w"] / b["h"] > a["w"] / a["h"]
            note(5, f"{name} should be {'wider' if wider else 'taller'}.")
        shift = (b["x"] + b["w"] / 2) - (a["x"] + a["w"] / 2)
        if abs(shift) > 0.15 * width:
            note(7, f"{name} should be further to the {'right' if shift > 0 else 'left'}.")
        if a["round"] != b["round"]:
            note(3, f"{name} should have {'round' if b['round'] else 'square'} corners.")
        if len([1 for x, y in zip(shown, wanted) if x != y]) > 4 and i >= 4:
            break


def _buttons(shown, wanted, note):
    if not shown or not wanted:
        return
    a, b = shown[0], wanted[0]
    buttons, first = ("buttons", "first button") if len(wanted) > 1 else ("button", "button")
    both = a["background"] and b["background"]
    if both and distance(a["background"], b["background"]) > 12:
        note(6, f"The {buttons} should be {shade(b['background'], a['background'])}.")
    elif not both and a["background"] != b["background"]:
        filled = "plain, without a filled background"
        if b["background"]:
            filled = f"filled with {colour(b['background'])}"
        note(5, f"The {buttons} should be {filled}.")
    if a["round"] != b["round"]:
        note(3, f"The {buttons} should have {'round' if b['round'] else 'square'} corners.")
    if SequenceMatcher(None, a["text"].lower(), b["text"].lower()).ratio() < 0.5 and b["text"]:
        note(2, f"The {first} should say \"{b['text']}\".")


def _bands(shown, wanted, note):
    pairs = align(shown["bands"], wanted["bands"])
    title = (wanted["headline"] or {}).get("text", "")[:40]  # checked by _headline
    for a, b in pairs:
        name = band_name(b or a)
        if a is None:
            apart = distance(b["background"], wanted["background"]) > 12
            extra = f" with {colour(b['background'])} background" if apart else ""
            note(9 if b["kind"] != "section" else 7,
                 f"There should be {article(name)}{extra}{where(b, wanted)}.")
        elif b is None:
            note(8 if a["kind"] != "section" else 6,
                 f"There should be no {name}{where(a, shown)}.")
        else:
            if a["kind"] != b["kind"] and {a["kind"], b["kind"]} & {"sidebar"}:
                side = " on the " + b["side"] if b["side"] else ""
                note(9, f"The {band_name(a)} should be {article(b['kind'])}{side}.")
            elif a["side"] != b["side"]:
                note(9, f"The {name} should be on the {b['side']}.")
            d = distance(a["background"], b["background"])
            stands_out = (distance(a["background"], shown["background"]) > 3
                          or distance(b["background"], wanted["background"]) > 3)
            if d > 8 and stands_out:
                background = article(shade(b["background"], a["background"]))
                note(min(9, 5 + d / 20), f"The {name} should have {background} background.")
            elif (b["text"] != title and a["color"] and b["color"]
                  and distance(a["color"], b["color"]) > 25):
                note(4, f"The text of the {name} should be {shade(b['color'], a['color'])}.")
            if a["columns"] != b["columns"]:
                columns = number(b["columns"], "column")
                note(8, f"The {name} should have {columns}, not {a['columns']}.")
            elif a["place"] != b["place"] and b["place"] and a["place"] and b["text"] != title:
                note(5, f"The text of the {name} should be {_placed(b['place'])}.")


def align(shown: list, wanted: list) -> list:
    """Pairs (a, b) of bands in order, None in place of a missing partner.

    The cheapest alignment, as in a diff of texts. Height and colour cost nothing.
    """
    def cost(a, b):
        same_text = SequenceMatcher(None, a["text"].lower(), b["text"].lower()).ratio()
        return (0.8 * (a["kind"] != b["kind"]) + 0.7 * (1 - same_text)
                + 0.25 * (a["columns"] != b["columns"])
                + 0.25 * ((a["pictures"] > 0) != (b["pictures"] > 0)))
    rows, columns = len(shown) + 1, len(wanted) + 1
    best = [[None] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            choices = [(0.0, None)] if i == j == 0 else []
            if i and j:
                pair_cost = cost(shown[i - 1], wanted[j - 1])
                choices.append((best[i - 1][j - 1][0] + pair_cost, (i - 1, j - 1)))
            if i:
                choices.append((best[i - 1][j][0] + 0.75, (i - 1, j)))
            if j:
                choices.append((best[i][j - 1][0] + 0.75, (i, j - 1)))
            best[i][j] = min(choices, key=lambda choice: choice[0])
    pairs, i, j = [], rows - 1, columns - 1
    while (step := best[i][j][1]) is not None:
        pairs.append((shown[i - 1] if step[0] < i else None,
                      wanted[j - 1] if step[1] < j else None))
        i, j = step
    return pairs[::-1]


def band_name(band: dict) -> str:
    """What a person calls it: its kind, and for a section its text."""
    if band["kind"] == "section" and band["text"]:
        return f"section \"{band['text']}\""
    return band["kind"]


def where(band: dict, page: dict) -> str:
    """Words for its place on the page; "" in the middle."""
    if band["side"]:
        return f" on the {band['side']}"
    middle = (band["y"] + band["h"] / 2) / page["height"]
    return " at the top" if middle < 0.2 else " at the bottom" if middle > 0.8 else ""


def _count(shown: int, wanted: int, one: str, weight: float, note) -> None:
    if shown != wanted:
        if min(shown, wanted) == 0:  # none at all stands out more
            weight += 2
        instead = f", not {shown}" if shown else ""
        note(weight, f"There should be {number(wanted, one)}{instead}.")


def number(n: int, one: str) -> str:
    """A count in words: "no links", "one link" or "2 links"."""
    if n == 1:
        return f"one {one}"
    return f"{n or 'no'} {one}s"


def article(words: str) -> str:
    """The words after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def ordinal(i: int) -> str:
    """The ordinal of index i: "first" for 0, "second" for 1, ..."""
    words = ("first", "second", "third", "fourth", "fifth", "sixth")
    return words[i] if i < len(words) else f"{i + 1}th"


def shade(wanted, shown) -> str:
    """Words for the wanted colour: "pale blue, not white", or "a darker red" than the shown one."""
    a, b = colour(shown), colour(wanted)
    if a != b:
        return f"{b}, not {a}" if shown else b
    return f"a {'darker' if sum(wanted) < sum(shown) else 'lighter'} {b}"


def colour(rgb) -> str:
    """A plain English name; None: transparent."""
    if rgb is None:
        return "see-through"
    r, g, b = (value / 255 for value in rgb)
    hue, light, _ = colorsys.rgb_to_hls(r, g, b)
    chroma = max(r, g, b) - min(r, g, b)
    if chroma < (0.025 if light > 0.85 else 0.13):
        names = ((0.985, "white"), (0.97, "off-white"), (0.92, "very light gray"),
                 (0.75, "light gray"), (0.42, "gray"), (0.16, "dark gray"), (-1, "black"))
        return next(name for limit, name in names if light > limit)
    degrees = hue * 360
    names = ((15, "red"), (42, "orange"), (66, "yellow"), (165, "green"), (190, "teal"),
             (228, "blue"), (250, "indigo"), (290, "purple"), (345, "pink"), (361, "red"))
    name = next(name for limit, name in names if degrees < limit)
    depths = ((0.9, "very pale "), (0.8, "pale "), (0.64, "light "), (0.4, ""), (-1, "dark "))
    depth = next(word for limit, word in depths if light > limit)
    return depth + name


def distance(one, other) -> float:
    """How different two colours look, 0 to about 100. None is see-through.

    "redmean", a weighted distance in RGB.
    """
    if one is None or other is None:
        return 0.0 if one == other else 40.0
    mean = (one[0] + other[0]) / 2
    r, g, b = ((x - y) ** 2 for x, y in zip(one, other))
    return ((2 + mean / 256) * r + 4 * g + (2 + (255 - mean) / 256) * b) ** 0.5 / 7.65
