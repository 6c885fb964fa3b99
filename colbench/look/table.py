"""The report's table, bars and costs: what metrics.json holds, for report_page.html."""
import json

from colbench.env.evidence import SPENT
from colbench.run.fields import COUNT, is_number

COLUMNS = {  # metric -> (heading, what it means); others are shown under their own name
    "success": ("success", "share of episodes in which every hidden test call passed"),
    "tests_passed": ("tests passed", "share of hidden test calls passed, mean over episodes"),
    "similarity": ("similarity", "of the answer's picture to the reference's, cosine, mean over episodes"),
    "win_rate": ("win rate", "share of answers closer to the reference than the opponent's; ties count half"),
    "no_page": ("no page", "share of answers that could not be rendered"),
    "turns": ("turns", "agent messages an episode"),
    "tokens_per_message": ("tokens a message", "as the agent's model counts them"),
    "answered_at_limit": ("at the limit", "share of episodes whose last turn came without the answer marker"),
    "leak_rate": ("leaks", "share of human replies whose first draft held code of the reference"),
    "episodes": ("episodes", "episodes that ended without an error"), "errors": ("errors", "dialogues that broke off"),
}
PERCENT = {"success", "tests_passed", "answered_at_limit", "leak_rate", "win_rate", "wins", "ties", "no_page",
           "contradicting", "pass^k", "pass@k"}
REPEATED = (("pass^k", "chance that all of k episodes of a task are right"),
            ("pass@k", "chance that at least one of k episodes of a task is right"))
HUMAN = (("contradicting", "contradict the reference", "share of replies that cannot be true by the reference"),
         ("empty", "empty", "share of replies without text"),
         ("cut", "cut", "share of replies cut at the bound on their length, or where code began"))
TOOK = (("seconds", "seconds", "wall time of playing and scoring; episodes are played side by side"),
        ("requests", "requests", "HTTP requests to servers that play agent or human"),
        ("retries", "sent again", "requests that the client sent again after an error"))
COST = {"all": float, "per_episode": float, "per_solved?": float}
EVIDENCE = {  # what colbench.env.evidence put beside the metrics of a policy
    "endings?": dict, "tokens?": {f"{name}?": COST for name in SPENT},
    "clock?": {f"{name}?": COST for name, *_ in TOOK},
    "human?": {"replies": COUNT, "empty": float, "cut": float, "contradicting?": float, "contradicting_95?": [float]},
    "could_have_shown?": {"measure": str, "to": str, "difference": float},
    "repetitions?": [{"k": COUNT, "pass^k": float, "pass^k_95": [float], "pass@k": float, "pass@k_95": [float]}]}


def table(tables: list[tuple[str, dict]]) -> dict:
    """What the page draws of [(name, metrics)]: names; sections, {"title", "rows"} with a cell a name; charts; a note.
    A number beside a NAME_95 has an interval and is charted. Scorer modes that agree are shown once."""
    flats = []
    for _, metrics in tables:
        flat = {}
        for key, value in metrics.items():
            single = {key: value, f"{key}_95": metrics.get(f"{key}_95")}
            for mode, group in [(key.replace("_", " "), value) if isinstance(value, dict) else ("", single)]:
                for metric, number in group.items() if f"{key}?" not in EVIDENCE else ():
                    if is_number(number):
                        flat[metric, mode] = cell(shown_number(metric, number), number, metric, group)
        flats.append(flat)
    order, keys = list(COLUMNS), list(dict.fromkeys(key for flat in flats for key in flat))
    metrics = sorted(dict.fromkeys(m for m, _ in keys), key=lambda m: order.index(m) if m in order else len(order))
    rows, charts = [], []
    for metric in metrics:
        title, help_text = COLUMNS.get(metric, (metric.replace("_", " "), metric))
        modes, alike = [mode for name, mode in keys if name == metric], {}
        for mode in modes:
            alike.setdefault(json.dumps([flat.get((metric, mode)) for flat in flats]), []).append(mode)
        for of_row in alike.values():
            rows.append({"label": title if "" in of_row else f"{title} \u00b7 {', '.join(of_row)}",
                         "help": help_text, "cells": [flat.get((metric, of_row[0])) for flat in flats]})
        bars = []
        for number, flat in enumerate(flats):
            drawn = {}
            for mode in modes:
                if (metric, mode) in flat:
                    drawn.setdefault(json.dumps(flat[metric, mode]), []).append(mode)
            bars += [{"number": number, "pale": modes[0] not in of_bar,
                      "mode": ", ".join(filter(None, of_bar)) if len(drawn) > 1 else "", **json.loads(text)}
                     for text, of_bar in drawn.items()]
        if any(bar["interval"] for bar in bars):
            charts.append({"title": f"{title.capitalize()}, 95 % interval", "bars": bars})
    note = ("fixed runs an answer in one namespace, official applies the released code's scoping and keyword rules, "
            "clean tasks are those that can be won." if {"fixed", "official"} <= {mode for _, mode in keys} else "")
    sections = [{"title": "", "rows": rows}, *evidence_sections([metrics for _, metrics in tables])]
    return {"names": [name for name, _ in tables], "sections": [s for s in sections if s["rows"]], "charts": charts,
            "endings": [{label: n for label, n in m.get("endings", {}).items() if is_number(n) and n > 0}
                        for _, m in tables], "note": note}


def cell(text: str, value=None, metric="", group=()) -> dict:
    """A cell of the table: its text, and the interval NAME_95 that stands beside the metric in its group."""
    interval = dict(group).get(f"{metric}_95")
    pair = isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(is_number, interval))
    return {"text": text, "value": value, "interval": list(interval) if pair else None,
            "below": " .. ".join(shown_number(metric, end) for end in interval) if pair else None}


def evidence_sections(metrics: list[dict]) -> list[dict]:
    """Sections of the table from what colbench.env.evidence counted of each policy."""
    def section(title, rows):
        return {"title": title, "rows": [{"label": label, "help": help_text, "cells": cells}
                                         for label, help_text, cells in rows if any(cells)]}

    def costs(kind, name):
        found = [m.get(kind, {}).get(name) for m in metrics]
        return [cost and cell(amount(cost["per_episode"])) | {
            "below": cost.get("per_solved") and f"{amount(cost['per_solved'])} a solved task"} for cost in found]

    def shares(rows, name):
        return [cell(f"{100 * row[name]:.1f}\u00a0%", row[name], name, row) if row and name in row else None
                for row in rows]

    def amount(number):
        return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"

    ks = sorted({row["k"] for m in metrics for row in m.get("repetitions", ()) if row["k"] > 1})
    of_k = {k: [next((row for row in m.get("repetitions", ()) if row["k"] == k), None) for m in metrics] for k in ks}
    human, shown = [m.get("human") for m in metrics], [m.get("could_have_shown") for m in metrics]
    return [
        section("Differences", [(
            "smallest that could be shown", "with a chance of 80 %, by a two-sided test at 5 %, task by task",
            [row and cell(f"{100 * row['difference']:.1f}\u00a0%") | {"below": f"{row['measure']}, to {row['to']}"}
             for row in shown])]),
        section("Several episodes a task", [
            (name.replace("k", str(k)), help_text, shares(of_k[k], name)) for name, help_text in REPEATED for k in ks]),
        section("The simulated human", [
            ("replies", "", [h and cell(f"{h['replies']:,}") for h in human]),
            *((label, help_text, shares(human, name)) for name, label, help_text in HUMAN)]),
        section("Tokens an episode", [
            (f"{name.replace('_', ': ')}", "prompts count as often as they were read", costs("tokens", name))
            for name in SPENT]),
        section("Time and requests an episode", [
            (label, help_text, costs("clock", name)) for name, label, help_text in TOOK])]


def shown_number(metric: str, number: float) -> str:
    if metric in PERCENT:
        return f"{100 * number:.1f}\u00a0%"
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.3g}" if abs(number) < 1 else f"{number:.1f}"
