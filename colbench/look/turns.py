"""Turn by turn, for report_page.html: success by the number of turns, questions before the answer, the advantage of
each turn, and one state whose candidates the critic ranked.
"""
from pathlib import Path

from colbench.env.base import RIGHT
from colbench.env.data import failed
from colbench.run.errors import UserError
from colbench.run.fields import checked
from colbench.run.files import dialogue_hash


def add_turns(data, files, prefix, run) -> None:
    """Put panels into data["turns"]: {"title", "unit", "series": [{"label", "steps", "values", "counts"}]}."""
    environment = files["environment"]
    success, questions, advantages = {}, {}, {}
    for line in files["episodes"]:
        if not failed(line) and is_of(environment, line):
            label = prefix + short_name(line["policy"], run)
            turns = sum(m["role"] == "assistant" for m in line["dialogue_history"])
            success.setdefault(label, {}).setdefault(turns, []).append(float(environment.ending(line) == RIGHT))
            questions.setdefault(label, {}).setdefault(turns - 1, []).append(1)
    there = {(line["policy"], line["id"], line["sample"]): dialogue_hash(line) for line in files["episodes"]}
    for row in files["advantages"]:
        if row.get("dialogue") in (None, there.get((row["policy"], row["id"], row["sample"]))):
            label = prefix + short_name(row["policy"], run)
            for turn, found in enumerate(row["turns"], 1):
                advantages.setdefault(label, {}).setdefault(turn, []).append(found["advantage"])
    for row in files["preferences"] if not advantages else ():
        if row["advantages"]:  # the first candidate is the one that was played
            advantages.setdefault(prefix + "training", {}).setdefault(row["turn"], []).append(row["advantages"][0])
    for title, unit, found in (("Success by number of agent messages", "messages", success),
                               ("Share of episodes by questions before the answer", "questions", questions),
                               ("Mean advantage of the message played, by turn", "turn", advantages)):
        if title.startswith("Success") and not environment.has_success:
            continue
        panel = next((one for one in data["turns"] if one["title"] == title), None)
        if panel is None:
            data["turns"].append(panel := {"title": title, "unit": unit, "series": []})
        for label, at in found.items():
            steps, n = sorted(at), sum(map(len, at.values()))
            values = [len(at[x]) / n if found is questions else mean(at[x]) for x in steps]
            panel["series"].append({"label": label, "steps": steps, "values": [float(f"{v:.4g}") for v in values],
                                    "counts": [len(at[x]) for x in steps]})


def state_shown(episodes: list[dict]) -> list | None:
    """[episode, turn] of the state whose candidates the page shows: early in a dialogue, many candidates, and the
    better half far above the worse."""
    def interest(place):
        values = [c[1] for c in episodes[place[0]]["turns"][place[1]]["candidates"] if c[1] is not None]
        half, agent = len(values) // 2, (place[1] + 1) // 2
        return len(values) >= 8, 2 <= agent <= 4, half and sum(values[:half]) / half - sum(values[-half:]) / half
    places = [[i, k] for i, e in enumerate(episodes) for k, t in enumerate(e["turns"]) if "candidates" in t]
    return max(places, key=interest, default=None)


def is_of(environment, line: dict) -> bool:
    """Whether the scores are this environment's; nothing in the folder may say which one it is."""
    try:
        return bool(checked(line.get("scores", {}), environment.scores, "scores") or not environment.scores)
    except UserError:
        return False


def short_name(policy: str, run: Path) -> str:
    """A policy's name without the folder of its run."""
    try:
        return str(Path(policy).relative_to(run))
    except ValueError:
        return policy


def mean(values: list) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None
