"""The scripted reviewer: compares two pages as the browser laid them out, and says in plain words what stands out most.

No model, no HTML, no class names: it sees what colbench.env.frontend.layout measures. The same pages always get the
same sentences.
"""
import colorsys
from difflib import SequenceMatcher

SAME = "This looks just like what I had in mind."
NOTHING = "I can't see any page yet. Please show me one."


def review(mine: dict | None, wanted: dict, most: int = 3) -> str:
    """What a person who has `wanted` in mind says about `mine`: up to `most` differences.

    Both are layouts; None: nothing was shown.
    """
    if mine is None:
        return NOTHING
    found = differences(mine, wanted)
    return " ".join(sentence for _, sentence in found[:most]) or SAME


def differences(mine: dict, wanted: dict) -> list:
    """[(weight, sentence), ...], the heaviest first; of equal weight, in the order in which they are looked for."""
    found = []
    note = lambda weight, sentence: found.append((weight, sentence))  # noqa: E731
    if wanted["letters"] and not mine["letters"] and not mine["bands"]:
        return [(30, "Your page is empty.")]
    if (d := distance(mine["background"], wanted["background"])) > 6:
        note(min(14, 6 + d / 8), f"The page background should be {shade(wanted['background'], mine['background'])}.")
    _headline(mine, wanted, note)
    _pictures(mine["pictures"], wanted["pictures"], wanted["width"], note)
    _bands(mine, wanted, note)
    for key, one, weight in (("fields", "input field", 7), ("buttons", "button", 7), ("tables", "table", 7)):
        _count(len(mine[key]), len(wanted[key]), one, weight, note)
    _buttons(mine["buttons"], wanted["buttons"], note)
    if len(mine["tables"]) == len(wanted["tables"]):
        for a, b in zip(mine["tables"], wanted["tables"]):
            if a["rows"] != b["rows"]:
                note(5, f"The table should have {number(b['rows'], 'row')}, not {a['rows']}.")
    _count(mine["links"], wanted["links"], "link", 3, note)
    if None not in (mine["serif"], wanted["serif"]) and mine["serif"] != wanted["serif"]:
        note(6, f"The text should be in a {'classic serif font' if wanted['serif'] else 'plain font without serifs'}.")
    if mine["text"] and wanted["text"]:
        if distance(mine["text"]["color"], wanted["text"]["color"]) > 20:
            note(3, f"The body text should be {shade(wanted['text']['color'], mine['text']['color'])}.")
        if not 0.8 < wanted["text"]["size"] / mine["text"]["size"] < 1.25:
            larger = wanted["text"]["size"] > mine["text"]["size"]
            note(3, f"The body text should be {'larger' if larger else 'smaller'}.")
    if not found:  # finer things only where nothing else differs
        if not 0.75 < (wanted["letters"] + 20) / (mine["letters"] + 20) < 1.33:
            note(2, f"There should be {'more' if wanted['letters'] > mine['letters'] else 'less'} text on the page.")
        if abs(wanted["height"] - mine["height"]) > 0.04 * wanted["height"]:
            note(2, f"The page should be {'longer' if wanted['height'] > mine['height'] else 'shorter'}, with "
                    f"{'more' if wanted['height'] > mine['height'] else 'less'} room between its parts.")
    return sorted(dict((sentence, (weight, sentence)) for weight, sentence in reversed(found)).values(),
                  key=lambda item: (-item[0], [s for _, s in found].index(item[1])))


def _headline(mine, wanted, note):
    a, b = mine["headline"], wanted["headline"]
    if not b:
        return
    if not a:
        return note(10, f"There should be a headline, \"{b['text']}\".")
    if SequenceMatcher(None, a["text"].lower(), b["text"].lower()).ratio() < 0.7:
        note(8, f"The headline should read \"{b['text']}\".")
    if a["place"] != b["place"]:
        note(8, f"The headline should be {'centred' if b['place'] == 'centre' else 'on the ' + b['place']}"
                f", not {'centred' if a['place'] == 'centre' else 'on the ' + a['place']}.")
    if not 0.8 < b["size"] / a["size"] < 1.25:
        note(6, f"The headline should be {'much ' if not 0.5 < b['size'] / a['size'] < 2 else ''}"
                f"{'larger' if b['size'] > a['size'] else 'smaller'}.")
    if distance(a["color"], b["color"]) > 20:
        note(5, f"The headline should be {shade(b['color'], a['color'])}.")


def _pictures(mine, wanted, width, note):
    if len(mine) != len(wanted):
        if len(wanted) == 1:
            middle = (wanted[0]["x"] + wanted[0]["w"] / 2) / width
            place = ", over the whole width" if wanted[0]["w"] > 0.6 * width else \
                ", on the left" if middle < 0.4 else ", on the right" if middle > 0.6 else ", in the middle"
            return note(9 if mine else 11, f"There should be one picture{f', not {len(mine)}' if mine else place}.")
        return _count(len(mine), len(wanted), "picture", 9, note)
    for i, (a, b) in enumerate(zip(mine, wanted)):
        name = "The picture" if len(wanted) == 1 else f"The {ordinal(i)} picture"
        grown = (b["w"] * b["h"]) / max(1, a["w"] * a["h"])
        if not 0.77 < grown < 1.3:
            note(min(9, 4 + 12 * abs(b["w"] * b["h"] - a["w"] * a["h"]) / (width * 768)),
                 f"{name} should be {'larger' if grown > 1 else 'smaller'}.")
        elif not 0.8 < (b["w"] / b["h"]) / (a["w"] / a["h"]) < 1.25:
            note(5, f"{name} should be {'wider' if b['w'] / b['h'] > a['w'] / a['h'] else 'taller'}.")
        shift = (b["x"] + b["w"] / 2) - (a["x"] + a["w"] / 2)
        if abs(shift) > 0.15 * width:
            note(7, f"{name} should be further to the {'right' if shift > 0 else 'left'}.")
        if a["round"] != b["round"]:
            note(3, f"{name} should have {'round' if b['round'] else 'square'} corners.")
        if len([1 for x, y in zip(mine, wanted) if x != y]) > 4 and i >= 4:
            break


def _buttons(mine, wanted, note):
    if not mine or not wanted:
        return
    a, b = mine[0], wanted[0]
    both = a["background"] and b["background"]
    if both and distance(a["background"], b["background"]) > 12:
        note(6, f"The button{'s' * (len(wanted) > 1)} should be {shade(b['background'], a['background'])}.")
    elif not both and a["background"] != b["background"]:
        filled = f"filled with {colour(b['background'])}" if b["background"] else "plain, without a filled background"
        note(5, f"The button{'s' * (len(wanted) > 1)} should be {filled}.")
    if a["round"] != b["round"]:
        note(3, f"The button{'s' * (len(wanted) > 1)} should have {'round' if b['round'] else 'square'} corners.")
    if SequenceMatcher(None, a["text"].lower(), b["text"].lower()).ratio() < 0.5 and b["text"]:
        note(2, f"The {'first ' * (len(wanted) > 1)}button should say \"{b['text']}\".")


def _bands(mine, wanted, note):
    pairs = align(mine["bands"], wanted["bands"])
    title = (wanted["headline"] or {}).get("text", "")  # _headline looks at that
    for a, b in pairs:
        name = band_name(b or a)
        if a is None:
            apart = distance(b["background"], wanted["background"]) > 12
            extra = f" with {colour(b['background'])} background" if apart else ""
            note(9 if b["kind"] != "section" else 7, f"There should be {article(name)}{extra}{where(b, wanted)}.")
        elif b is None:
            note(8 if a["kind"] != "section" else 6, f"There should be no {name}{where(a, mine)}.")
        else:
            if a["kind"] != b["kind"] and {a["kind"], b["kind"]} & {"sidebar"}:
                side = " on the " + b["side"] if b["side"] else ""
                note(9, f"The {band_name(a)} should be {article(b['kind'])}{side}.")
            elif a["side"] != b["side"]:
                note(9, f"The {name} should be on the {b['side']}.")
            da, db = distance(a["background"], mine["background"]), distance(b["background"], wanted["background"])
            if (d := distance(a["background"], b["background"])) > 8 and (da > 3 or db > 3):
                background = article(shade(b["background"], a["background"]))
                note(min(9, 5 + d / 20), f"The {name} should have {background} background.")
            elif b["text"] != title[:40] and a["color"] and b["color"] and distance(a["color"], b["color"]) > 25:
                note(4, f"The text of the {name} should be {shade(b['color'], a['color'])}.")
            if a["columns"] != b["columns"]:
                note(8, f"The {name} should have {number(b['columns'], 'column')}, not {a['columns']}.")
            elif a["place"] != b["place"] and b["place"] and a["place"] and b["text"] != title[:40]:
                place = "centred" if b["place"] == "centre" else "on the " + b["place"]
                note(5, f"The text of the {name} should be {place}.")


def align(mine: list, wanted: list) -> list:
    """Pairs (a, b) of bands in order; None where one has no partner.

    The cheapest alignment, as with texts; a changed height or colour does not tear a pair apart.
    """
    def cost(a, b):
        same_text = SequenceMatcher(None, a["text"].lower(), b["text"].lower()).ratio()
        return (0.8 * (a["kind"] != b["kind"]) + 0.7 * (1 - same_text) + 0.25 * (a["columns"] != b["columns"])
                + 0.25 * ((a["pictures"] > 0) != (b["pictures"] > 0)))
    rows, columns = len(mine) + 1, len(wanted) + 1
    best = [[None] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            choices = [(0.0, None)] if i == j == 0 else []
            if i and j:
                choices.append((best[i - 1][j - 1][0] + cost(mine[i - 1], wanted[j - 1]), (i - 1, j - 1)))
            if i:
                choices.append((best[i - 1][j][0] + 0.75, (i - 1, j)))
            if j:
                choices.append((best[i][j - 1][0] + 0.75, (i, j - 1)))
            best[i][j] = min(choices, key=lambda choice: choice[0])
    pairs, i, j = [], rows - 1, columns - 1
    while (step := best[i][j][1]) is not None:
        pairs.append((mine[i - 1] if step[0] < i else None, wanted[j - 1] if step[1] < j else None))
        i, j = step
    return pairs[::-1]


def band_name(band: dict) -> str:
    """What a person calls it: its kind, or a section by its text."""
    return f"section \"{band['text']}\"" if band["kind"] == "section" and band["text"] else band["kind"]


def where(band: dict, page: dict) -> str:
    """Words for its place on the page; "" in the middle."""
    if band["side"]:
        return f" on the {band['side']}"
    middle = (band["y"] + band["h"] / 2) / page["height"]
    return " at the top" if middle < 0.2 else " at the bottom" if middle > 0.8 else ""


def _count(mine: int, wanted: int, one: str, weight: float, note) -> None:
    if mine != wanted:
        few = min(mine, wanted) == 0  # none at all stands out more
        note(weight + 2 * few, f"There should be {number(wanted, one)}" + (f", not {mine}." if mine else "."))


def number(n: int, one: str) -> str:
    """How many, in words: "no links", "one link" or "2 links"."""
    return f"no {one}s" if n == 0 else f"one {one}" if n == 1 else f"{n} {one}s"


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def ordinal(i: int) -> str:
    """The word for number i from 0: "first", "second", ..."""
    return ("first", "second", "third", "fourth", "fifth", "sixth")[i] if i < 6 else f"{i + 1}th"


def shade(wanted, mine) -> str:
    """Words for a colour, set apart from another one: "pale blue, not white", or "a darker red"."""
    a, b = colour(mine), colour(wanted)
    if a != b:
        return f"{b}, not {a}" if mine else b
    return f"a {'darker' if sum(wanted) < sum(mine) else 'lighter'} {b}"


def colour(rgb) -> str:
    """A plain English name; None: transparent."""
    if rgb is None:
        return "see-through"
    r, g, b = (value / 255 for value in rgb)
    hue, light, _ = colorsys.rgb_to_hls(r, g, b)
    chroma = max(r, g, b) - min(r, g, b)
    if chroma < (0.025 if light > 0.85 else 0.13):
        names = ((0.985, "white"), (0.97, "off-white"), (0.92, "very light gray"), (0.75, "light gray"), (0.42, "gray"),
                 (0.16, "dark gray"), (-1, "black"))
        return next(name for limit, name in names if light > limit)
    degrees = hue * 360
    names = ((15, "red"), (42, "orange"), (66, "yellow"), (165, "green"), (190, "teal"), (228, "blue"), (250, "indigo"),
             (290, "purple"), (345, "pink"), (361, "red"))
    name = next(name for limit, name in names if degrees < limit)
    depths = ((0.9, "very pale "), (0.8, "pale "), (0.64, "light "), (0.4, ""), (-1, "dark "))
    depth = next(word for limit, word in depths if light > limit)
    return depth + name


def distance(one, other) -> float:
    """How different two colours look, 0 to about 100 ("redmean", a weighted distance in RGB). None is see-through."""
    if one is None or other is None:
        return 0.0 if one == other else 40.0
    mean = (one[0] + other[0]) / 2
    r, g, b = ((x - y) ** 2 for x, y in zip(one, other))
    return ((2 + mean / 256) * r + 4 * g + (2 + (255 - mean) / 256) * b) ** 0.5 / 7.65
