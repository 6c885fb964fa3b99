"""The report turn by turn: success by number of turns, questions before the answer, advantage per
turn, and one state whose candidates the critic ranked.
"""
from pathlib import Path

from colbench.env.base import RIGHT
from colbench.env.data import failed
from colbench.run.errors import UserError
from colbench.run.fields import checked
from colbench.run.files import dialogue_hash


def add_turns(data, files, prefix, run) -> None:
    """Put panels into data["turns"].

    {"title", "unit", "series": [{"label", "steps", "values", "counts"}]}
    """
    environment = files["environment"]
    success, questions, advantages = {}, {}, {}
    for line in files["episodes"]:
        if not failed(line) and is_of(environment, line):
            label = prefix + short_name(line["policy"], run)
            turns = sum(m["role"] == "assistant" for m in line["dialogue_history"])
            solved = float(environment.ending(line) == RIGHT)
            success.setdefault(label, {}).setdefault(turns, []).append(solved)
            questions.setdefault(label, {}).setdefault(turns - 1, []).append(1)
    hashes = {(line["policy"], line["id"], line["sample"]): dialogue_hash(line)
              for line in files["episodes"]}
    for row in files["advantages"]:
        if row.get("dialogue") in (None, hashes.get((row["policy"], row["id"], row["sample"]))):
            label = prefix + short_name(row["policy"], run)
            for n, turn in enumerate(row["turns"], 1):
                advantages.setdefault(label, {}).setdefault(n, []).append(turn["advantage"])
    for row in files["preferences"] if not advantages else ():
        if row["advantages"]:  # of the candidate that was played, the first one
            label, advantage = prefix + "training", row["advantages"][0]
            advantages.setdefault(label, {}).setdefault(row["turn"], []).append(advantage)
    for title, unit, by_label in (
            ("Success by number of agent messages", "messages", success),
            ("Share of episodes by questions before the answer", "questions", questions),
            ("Mean advantage of the message played, by turn", "turn", advantages)):
        if title.startswith("Success") and not environment.has_success:
            continue
        panel = next((panel for panel in data["turns"] if panel["title"] == title), None)
        if panel is None:
            panel = {"title": title, "unit": unit, "series": []}
            data["turns"].append(panel)
        for label, by_step in by_label.items():
            steps = sorted(by_step)
            counts = [len(by_step[step]) for step in steps]
            if by_label is questions:
                values = [count / sum(counts) for count in counts]
            else:
                values = [mean(by_step[step]) for step in steps]
            panel["series"].append({"label": label, "steps": steps,
                                    "values": [float(f"{v:.4g}") for v in values],
                                    "counts": counts})


def state_shown(episodes: list[dict]) -> list | None:
    """[episode, turn] of the state whose candidates the page shows.

    Early in a dialogue, with many candidates, the better half far above the worse.
    """
    def interest(place):
        episode, turn = place
        candidates = episodes[episode]["turns"][turn]["candidates"]
        values = [advantage for _, advantage, _ in candidates if advantage is not None]
        half = len(values) // 2
        agent_turn = (turn + 1) // 2
        gap = half and sum(values[:half]) / half - sum(values[-half:]) / half
        return len(values) >= 8, 2 <= agent_turn <= 4, gap

    places = [[i, k] for i, episode in enumerate(episodes)
              for k, turn in enumerate(episode["turns"]) if "candidates" in turn]
    return max(places, key=interest, default=None)


def is_of(environment, line: dict) -> bool:
    """Whether the scores are this environment's: the folder need not name its environment."""
    try:
        scores = checked(line.get("scores", {}), environment.scores, "scores")
        return bool(scores) or not environment.scores
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
