"""The report's table, bars and costs, from metrics.json, for report_page.html."""
import json

from colbench.env.evidence import SPENT
from colbench.run.fields import COUNT, is_number

COLUMNS = {  # metric -> (heading, meaning); other metrics are shown by their own name
    "success": ("success", "share of episodes in which every hidden test passed"),
    "tests_passed": ("tests passed", "share of hidden tests passed, mean over episodes"),
    "similarity": ("similarity", "of the pictures of answer and hidden page: cosine, mean over "
                   "episodes"),
    "win_rate": ("win rate", "share of answers closer to the hidden page than the opponent's; "
                 "ties count half"),
    "no_page": ("no page", "share of answers that could not be rendered"),
    "turns": ("turns per episode", "agent messages per episode"),
    "tokens_per_message": ("tokens/msg", "tokens per agent message, as the agent's model counts "
                           "them"),
    "answered_at_limit": ("at the limit", "share of episodes whose last turn came without the "
                          "answer marker"),
    "leak_rate": ("leaks", "share of human replies whose first draft contained hidden code"),
    "episodes": ("episodes", "episodes that ended without an error"),
    "errors": ("errors", "dialogues that failed"),
}
PERCENT = {"success", "tests_passed", "answered_at_limit", "leak_rate", "win_rate", "wins", "ties",
           "no_page", "contradicting", "pass^k", "pass@k"}
REPEATED = (("pass^k", "chance that all of k episodes of a task are right"),
            ("pass@k", "chance that at least one of k episodes of a task is right"))
HUMAN = (("contradicting", "contradict the hidden information",
          "share of replies that the hidden information rules out"),
         ("empty", "empty", "share of replies without text"),
         ("cut", "cut", "share of replies cut at the length limit, or where code began"))
TOOK = (("seconds", "seconds", "wall time of playing and scoring; episodes run in parallel"),
        ("requests", "requests", "HTTP requests to servers that play agent or human"),
        ("retries", "sent again", "requests that the client sent again after an error"))
COST = {"all": float, "per_episode": float, "per_solved?": float}
EVIDENCE = {  # what colbench.env.evidence adds to the metrics of a policy
    "endings?": dict, "tokens?": {f"{name}?": COST for name in SPENT},
    "clock?": {f"{name}?": COST for name, *_ in TOOK},
    "human?": {"replies": COUNT, "empty": float, "cut": float, "contradicting?": float,
               "contradicting_95?": [float]},
    "could_have_shown?": {"measure": str, "to": str, "difference": float},
    "repetitions?": [{"k": COUNT, "pass^k": float, "pass^k_95": [float], "pass@k": float,
                      "pass@k_95": [float]}]}


def table(tables: list[tuple[str, dict]]) -> dict:
    """What the page draws of [(name, metrics)]: names, sections, charts, endings and a note.

    A section is {"title", "rows"}; a row has one cell per name. A number with a NAME_95 next to it
    has an interval and is charted. Scorer modes that agree are shown once.
    """
    flats = []  # per name: {(metric, mode): cell}
    for _, metrics in tables:
        flat = {}
        for key, value in metrics.items():
            if f"{key}?" in EVIDENCE:
                continue
            mode, group = "", {key: value, f"{key}_95": metrics.get(f"{key}_95")}
            if isinstance(value, dict):
                mode, group = key.replace("_", " "), value
            for metric, number in group.items():
                if is_number(number):
                    text = shown_number(metric, number)
                    flat[metric, mode] = cell(text, number, metric, group)
        flats.append(flat)
    order = list(COLUMNS)
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    metrics = sorted(dict.fromkeys(metric for metric, _ in keys),
                     key=lambda metric: order.index(metric) if metric in order else len(order))
    rows, charts = [], []
    for metric in metrics:
        title, help_text = COLUMNS.get(metric, (metric.replace("_", " "), metric))
        modes = [mode for name, mode in keys if name == metric]
        alike = {}  # cells of a row -> the modes that have them
        for mode in modes:
            cells = json.dumps([flat.get((metric, mode)) for flat in flats])
            alike.setdefault(cells, []).append(mode)
        for of_row in alike.values():
            label = title if "" in of_row else f"{title} \u00b7 {', '.join(of_row)}"
            rows.append({"label": label, "help": help_text,
                         "cells": [flat.get((metric, of_row[0])) for flat in flats]})
        bars = []
        for number, flat in enumerate(flats):
            drawn = {}
            for mode in modes:
                if (metric, mode) in flat:
                    drawn.setdefault(json.dumps(flat[metric, mode]), []).append(mode)
            for text, of_bar in drawn.items():
                mode = ", ".join(filter(None, of_bar)) if len(drawn) > 1 else ""
                bars.append({"number": number, "pale": modes[0] not in of_bar, "mode": mode,
                             **json.loads(text)})
        if any(bar["interval"] for bar in bars):
            charts.append({"title": f"{title.capitalize()}, 95 % interval", "bars": bars})
    note = ""
    if {"fixed", "official"} <= {mode for _, mode in keys}:
        note = ("fixed runs an answer in one namespace; official applies the released code's "
                "scoping and keyword rules; clean tasks are those that can be won.")
    sections = [{"title": "", "rows": rows},
                *evidence_sections([metrics for _, metrics in tables])]
    return {"names": [name for name, _ in tables],
            "sections": [section for section in sections if section["rows"]],
            "charts": charts,
            "endings": [{label: n for label, n in metrics.get("endings", {}).items()
                         if is_number(n) and n > 0} for _, metrics in tables],
            "note": note}


def cell(text: str, value=None, metric="", group=()) -> dict:
    """A cell of the table: its text, and the interval NAME_95 of the metric in its group."""
    interval = dict(group).get(f"{metric}_95")
    below = None
    if (isinstance(interval, (list, tuple)) and len(interval) == 2
            and all(map(is_number, interval))):
        below = " .. ".join(shown_number(metric, end) for end in interval)
    return {"text": text, "value": value, "interval": list(interval) if below else None,
            "below": below}


def evidence_sections(metrics: list[dict]) -> list[dict]:
    """Sections of the table from what colbench.env.evidence counted for each policy."""
    def section(title, rows):
        return {"title": title, "rows": [{"label": label, "help": help_text, "cells": cells}
                                         for label, help_text, cells in rows if any(cells)]}

    def costs(kind, name):
        cells = []
        for cost in [m.get(kind, {}).get(name) for m in metrics]:
            if cost:
                solved = cost.get("per_solved")
                below = solved and f"{amount(solved)} per solved task"
                cost = cell(amount(cost["per_episode"])) | {"below": below}
            cells.append(cost)
        return cells

    def shares(rows, name):
        return [cell(f"{100 * row[name]:.1f}\u00a0%", row[name], name, row)
                if row and name in row else None for row in rows]

    def amount(number):
        return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"

    ks = sorted({row["k"] for m in metrics for row in m.get("repetitions", ()) if row["k"] > 1})
    of_k = {k: [next((row for row in m.get("repetitions", ()) if row["k"] == k), None)
                for m in metrics] for k in ks}
    humans = [m.get("human") for m in metrics]
    differences = [row and cell(f"{100 * row['difference']:.1f}\u00a0%")
                   | {"below": f"{row['measure']}, to {row['to']}"}
                   for row in [m.get("could_have_shown") for m in metrics]]
    return [
        section("Differences", [
            ("smallest detectable", "with 80 % power, by a two-sided test at 5 %, task by task",
             differences)]),
        section("Several episodes per task", [
            (name.replace("k", str(k)), help_text, shares(of_k[k], name))
            for name, help_text in REPEATED for k in ks]),
        section("The simulated human", [
            ("replies", "", [human and cell(f"{human['replies']:,}") for human in humans]),
            *((label, help_text, shares(humans, name)) for name, label, help_text in HUMAN)]),
        section("Tokens per episode", [
            (name.replace("_", ": "), "a prompt counts each time it is read", costs("tokens", name))
            for name in SPENT]),
        section("Time and requests per episode", [
            (label, help_text, costs("clock", name)) for name, label, help_text in TOOK])]


def shown_number(metric: str, number: float) -> str:
    if metric in PERCENT:
        return f"{100 * number:.1f}\u00a0%"
    if float(number).is_integer():
        return f"{number:.0f}"
    return f"{number:.3g}" if abs(number) < 1 else f"{number:.1f}"
