"""One HTML file to look at a run: results, training curves, dialogues with the credit per turn.

    python -m colbench.look.report runs/tiny       # runs/tiny/report.html, at any time during a run
    python -m colbench.look.report runs/a runs/b   # runs/a/report.html with both runs in every plot

It shows trajectories.jsonl, preferences.jsonl, the training logs (*_log.jsonl), episodes.jsonl,
metrics.json and advantages.jsonl (colbench.look.credit), as far as they exist. The report needs no
network and no other file except screenshots of pages, which it links by relative paths. The same
inputs give the same file.

Everything an LLM wrote is data: JSON without any `<`, put into the page as text nodes by the one
script of report_page.html. A content security policy allows that script, by its hash, and nothing
else.
"""
import argparse
import base64
import difflib
import hashlib
import json
import math
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

from colbench.env.base import environment_of_run
from colbench.env.data import (
    CREDIT,
    episode_line,
    failed,
    number_samples,
    state_line,
    trajectory_line,
)
from colbench.env.evidence import evidence
from colbench.look.table import EVIDENCE, table
from colbench.look.turns import add_turns, is_of, mean, short_name, state_shown
from colbench.run.errors import UserError, run_main
from colbench.run.fields import COUNT, checked, is_number
from colbench.run.files import dialogue_hash, read_so_far, write_aside
from colbench.run.settings import read_json

PAGE = Path(__file__).with_name("report_page.html")
MAX_TEXT = 20_000          # characters shown of one message or answer; the rest is counted
MAX_LINES = 400            # lines compared between the answer and the hidden information
EVALUATION_BYTES = 14.5e6  # JSON of evaluation episodes in one report; the rest is counted
TRAINING_BYTES = 4e6       # the same for training trajectories
MAX_TRAINING = 1_000       # training trajectories shown, those with ranked candidates first
POINTS = 300               # points of a curve; longer logs are averaged
CURVES = ("loss", "rewards/accuracies", "margin", "margin/nats", "log_ratio/chosen",
          "log_ratio/rejected")
LOG = {"step": COUNT, "tokens_per_second?": float, "peak_memory_gb?": float}
ANY_ENVIRONMENT = SimpleNamespace(scores={})
LINES = {"trajectories": trajectory_line(), "preferences": state_line, "advantages": CREDIT,
         "episodes": episode_line(ANY_ENVIRONMENT, policy=True)}


def write_report(output, runs, metrics=None, episodes=None) -> Path:
    """Write the report of these run folders to `output`.

    metrics ({policy: metrics}) and episodes (rows) replace the files of the first run.
    UserError: a folder with nothing to show, or a malformed line.
    """
    output = Path(output)
    runs = [Path(run) for run in runs]
    data = {"runs": [], "intro": [], "notes": [], "curves": [], "tasks": [], "systems": [],
            "episodes": [], "first": 0, "turns": [], "state": None}
    tables = []
    index = {"tasks": {}, "systems": {}}
    for number, run in enumerate(runs):
        files = {name: read_so_far(run / f"{name}.jsonl", kind) for name, kind in LINES.items()}
        files["trajectories"] = number_samples(files["trajectories"])
        logs = {path.name.removesuffix("_log.jsonl"): read_so_far(path, LOG)
                for path in sorted(run.glob("*_log.jsonl"))}
        if episodes is not None and number == 0:
            files["episodes"] = episodes
        if not any(files.values()) and not any(logs.values()):
            raise UserError(f"{run}: nothing to report: this folder has no episodes, trajectories, "
                            "preferences or logs")
        name = str(run) if len(runs) > 1 or run.name == "" else run.name
        data["runs"].append(name)
        prefix = f"{name}: " if len(runs) > 1 else ""
        for log, rows in logs.items():  # older runs have other policy logs, such as rft_log.jsonl
            stage = "critic" if log.startswith("critic") else "policy"
            if rows:
                data["curves"].append(curve(stage, prefix + log if log != stage else name, rows))
        files["environment"] = environment_of_run(run)
        if metrics and number == 0:
            by_policy = metrics
        else:
            by_policy = metrics_so_far(run, files["environment"], files["episodes"])
        tables += [(prefix + short_name(policy, run), values)
                   for policy, values in by_policy.items()]
        base = os.path.relpath(run.resolve(), output.resolve().parent)
        add_evaluation(data, index, files, prefix, run, base, EVALUATION_BYTES / len(runs))
        add_training(data, index, files, prefix, run, base, TRAINING_BYTES / len(runs))
        add_turns(data, files, prefix, run)
    data["table"] = table(tables)
    turns = [turn for episode in data["episodes"] for turn in episode["turns"]]
    advantages = [advantage for turn in turns for advantage in (
        turn.get("advantage"), *(row[1] for row in turn.get("candidates", [])))]
    advantages = sorted(abs(advantage) for advantage in advantages if advantage is not None)
    # the advantage from which on the colour is full
    data["scale"] = advantages[int(0.95 * (len(advantages) - 1))] if advantages else 1.0
    data["first"] = first_shown(data["episodes"])
    data["state"] = state_shown(data["episodes"])
    intro = ("An agent talks with a simulated human, who alone knows the hidden information. Only "
             f"the final answer is scored, by {environment_of_run(runs[0]).scored_by}.")
    if advantages:
        intro += (" The signed number next to a message is its advantage A(o, a, c): the mean "
                  "log-ratio per token between the critic, which sees the hidden information, and "
                  "the base model.")
    data["intro"].append(intro)
    page = PAGE.read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", page, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("@HASH@", f"sha256-{digest}")
    head, tail = page.split("@DATA@")
    html = head + embedded(data) + tail
    write_aside(output, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    return output


def embedded(data) -> str:
    """JSON for a script element: ASCII (lone surrogates and U+2028 escaped), no `<`, `>` or `&`."""
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a NaN loss; JSON has no NaN
        text = json.dumps(finite(data), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value):
    """`value` with None for every NaN and infinity in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value


# ---- the numbers


def metrics_so_far(run: Path, environment, episodes: list[dict]) -> dict:
    """{policy: metrics} from metrics.json, or, during an evaluation, from its episodes."""
    path = run / "metrics.json"
    if not path.exists():
        return metrics_of_unfinished(environment, episodes, run / "episodes.jsonl")
    policies = read_json(path).get("policies", {})
    if not policies or not all(isinstance(values, dict) for values in policies.values()):
        raise UserError(f"{path}: not written by evaluate.py; delete it and run evaluate.py again")
    return {name: checked(values, EVIDENCE, f"{path}: policies: {name}")
            for name, values in policies.items()}


def metrics_of_unfinished(environment, episodes: list[dict], path: Path) -> dict:
    """The same for an evaluation in progress."""
    if not all(failed(line) or is_of(environment, line) for line in episodes):
        return {}
    by_policy = {}
    for line in episodes:
        by_policy.setdefault(line["policy"], []).append(line)
    more = evidence(environment, by_policy, path)
    return {policy: environment.metrics(lines) | more[policy]
            for policy, lines in by_policy.items()}


# ---- curves


def curve(stage: str, label: str, rows: list[dict]) -> dict:
    """A training log for the page.

    Per name in CURVES: the logged values, and their running mean (5 % of the steps to either side),
    both averaged to at most POINTS points.
    """
    size = max(1, -(-len(rows) // POINTS))
    width = max(1, len(rows) // 20)
    values = {}
    for name in CURVES:
        column = [row[name] if is_number(row.get(name)) else None for row in rows]
        if any(v is not None for v in column):
            smooth = [mean(column[max(0, i - width):i + width + 1]) for i in range(len(column))]
            values[name] = {"raw": buckets(column, size), "smooth": buckets(smooth, size)}
    last = rows[-1] if rows else {}
    facts = [f"{label}: {len(rows)} steps logged"]
    if last.get("tokens_per_second"):
        facts.append(f"{last['tokens_per_second']:,.0f} tokens/s")
    if last.get("peak_memory_gb"):
        facts.append(f"peak memory {last['peak_memory_gb']:.1f} GB")
    steps = [row["step"] for row in rows[::size]]
    return {"stage": stage, "label": label, "steps": steps, "values": values,
            "note": ", ".join(facts)}


def buckets(values: list, size: int) -> list:
    means = [mean(values[i:i + size]) for i in range(0, len(values), size)]
    return [None if v is None else float(f"{v:.5g}") for v in means]


# ---- dialogues


def add_evaluation(data, index, files, prefix, run, base, max_bytes) -> None:
    """Put at most `max_bytes` of the evaluation's episodes into `data`, task by task."""
    credit = {(row["policy"], row["id"], row["sample"]): row for row in files["advantages"]}

    def credit_of(line):  # not that of an earlier dialogue with the same key
        row = credit.get((line["policy"], line["id"], line["sample"]))
        if row and ("dialogue" not in row or row["dialogue"] == dialogue_hash(line)):
            return row["turns"]
        return None

    by_policy = {}
    for line in files["episodes"]:
        by_policy.setdefault(line["policy"], []).append(line)
    place = {id(line): i for lines in by_policy.values() for i, line in enumerate(lines)}
    lines = sorted(files["episodes"], key=lambda line: place[id(line)])

    def shown(line):
        source = prefix + short_name(line["policy"], run)
        return shown_episode(data, index, files["environment"], line, source, base,
                             credit_of(line), {})

    n_shown = fill(data, max_bytes, [partial(shown, line) for line in lines])
    if n_shown < len(lines):
        data["notes"].append(
            f"{prefix}{len(lines) - n_shown} of {len(lines)} episodes are left out to keep this "
            f"file small; {run / 'episodes.jsonl'} has them all.")


def fill(data, max_bytes: float, makers) -> int:
    """Add episodes to `data` while they and their new tasks fit; returns how many did."""
    for n, make in enumerate(makers):
        tasks = len(data["tasks"])
        episode = make()
        max_bytes -= len(embedded(episode))
        max_bytes -= sum(len(embedded(task)) for task in data["tasks"][tasks:])
        if max_bytes < 0:
            return n
        data["episodes"].append(episode)
    return n + 1 if makers else 0


def add_training(data, index, files, prefix, run, base, max_bytes) -> None:
    """Put training trajectories into `data`, those with ranked candidates first.

    Without trajectories.jsonl, the states of preferences.jsonl instead.
    """
    ranked = {}
    for row in files["preferences"]:
        if row["candidates"]:
            ranked.setdefault((row["id"], row["sample"]), {})[row["turn"]] = row
    source = prefix + "training"
    lines = files["trajectories"]
    if not lines:
        source = prefix + "preferences"
        lines = [line_of_state(row) for states in ranked.values() for row in states.values()]
    lines = sorted(lines, key=lambda line: (line["id"], line["sample"]) not in ranked)

    def shown(line):
        states = ranked.get((line["id"], line["sample"]), {})
        return shown_episode(data, index, files["environment"], line, source, base, None, states)

    n_shown = fill(data, max_bytes, [partial(shown, line) for line in lines[:MAX_TRAINING]])
    if n_shown < len(lines):
        data["notes"].append(f"{prefix}{n_shown} of {len(lines)} training dialogues are shown, "
                             "those with ranked candidates first.")


def line_of_state(row: dict) -> dict:
    """A line of preferences.jsonl as a trajectory without its last message."""
    system, history = apart(row["messages"])
    return {"id": row["id"], "sample": row["sample"], "outcome": "", "answer": None,
            "system": system,
            "task": {"problem_description": history[0]["content"], "ground_truth": "",
                     "test_cases": {}},
            "dialogue_history": history + [{"role": "assistant", "content": None}]}


def apart(messages: list[dict]) -> tuple:
    """(the system prompt or None, the other messages)."""
    has_system = messages[0]["role"] == "system"
    return (messages[0]["content"] if has_system else None), messages[has_system:]


def shown_episode(data, index, environment, line, source, base, credit, ranked) -> dict:
    """A line of episodes.jsonl or trajectories.jsonl as the page shows it.

    credit: the turns of its line in advantages.jsonl; ranked: {turn: line of preferences.jsonl}.
    """
    task = line["task"]
    number = task_number(data, index, task, line["id"], base)
    turns, n = [], 0
    for message in line["dialogue_history"]:
        turn = {"role": message["role"], **cut(message["content"])}
        n += message["role"] == "assistant"
        if message["role"] == "assistant":
            if message.get("tokens"):
                turn["tokens"] = message["tokens"]
            output = str(message.get("output") or "")
            thinking = output.removesuffix(str(message["content"])).removesuffix("OUTPUT:").strip()
            if "OUTPUT:" in str(message.get("output")) and thinking:
                turn["thinking"] = cut(thinking)["text"]
            state = ranked.get(n, message)
            texts, advantages = state.get("candidates"), state.get("advantages")
            if texts and isinstance(advantages, list) and len(texts) == len(advantages):
                turn["candidates"] = ranking(texts, advantages, message)
                played = [c[1] for c in turn["candidates"] if c[2]]
                if played and played[0] is not None:
                    turn["advantage"] = played[0]
            if credit and n <= len(credit):
                turn["advantage"] = plain(credit[n - 1]["advantage"])
                # token lengths and hundredths keep the page small
                ends = [0, *(end for end, _ in credit[n - 1]["ratios"])]
                turn["tokens_long"] = [max(0, end - start) for start, end in zip(ends, ends[1:])]
                turn["ratios"] = [round(100 * ratio) for _, ratio in credit[n - 1]["ratios"]]
                if credit[n - 1].get("candidates"):
                    turn["candidates"] = ranking(*zip(*credit[n - 1]["candidates"]), message)
        if message.get("leaked"):
            turn["leaked"] = True
        if message["role"] == "user" and turns and task.get("ground_truth"):
            question = str(turns[-1]["text"])
            if environment.contradicts(task, question, message["content"]):
                turn["wrong"] = True
        if message.get("screenshot"):
            turn["picture"] = address(message["screenshot"], base)
        turns.append(turn)
    is_ours = is_of(environment, line)
    score = environment.details(line) if is_ours else {}
    if score.get("picture"):
        turns[-1]["picture"] = address(score["picture"], base)
    if score.get("reference_picture"):
        data["tasks"][number]["picture"] = address(score["reference_picture"], base)
    system = line.get("system")
    if system is not None:
        if system not in index["systems"]:
            index["systems"][system] = len(data["systems"])
            data["systems"].append(cut(system)["text"])
        system = index["systems"][system]
    episode = {"source": source, "task": number, "name": line.get("id") or "",
               "sample": line.get("sample") or 0, "system": system,
               "outcome": str(line.get("outcome") or "answered")[:200],
               "reward": line.get("reward"), "solved": None, "turns": turns,
               "leaked": any("leaked" in turn for turn in turns)}
    if failed(line) or is_ours and "reward" in line:
        episode["ending"] = environment.ending(line)
    if line.get("error") or episode["outcome"].startswith("error"):  # the dialogue failed
        episode["error"] = cut(line.get("error") or line["outcome"])["text"]
    kept = ("solved", "share", "verdicts", "note", "measure", "official")
    episode |= {name: score[name] for name in kept if name in score}
    if "verdicts" in score:
        episode["got"] = short_texts(score.get("got"))
        expected = short_texts(score.get("expected"))
        if data["tasks"][number].setdefault("expected", expected) != expected:
            episode["expected"] = expected
    elif environment.has_success and "reward" in line:
        episode["solved"] = line["reward"] == 1
    if line.get("answer") and task.get("ground_truth"):
        episode["code"] = code_of(cut(line["answer"])["text"])
        episode["diff"] = line_changes(data["tasks"][number]["hidden_info"], episode["code"])
    return episode


def task_number(data, index, task: dict, name: str, base: str) -> int:
    """The index of a task in data["tasks"], which has each task once."""
    key = (name, task["problem_description"], task.get("ground_truth") or "")
    if key not in index["tasks"]:
        index["tasks"][key] = len(data["tasks"])
        calls = task.get("test_cases")
        data["tasks"].append({
            "description": cut(task["problem_description"])["text"],
            "hidden_info": cut(task.get("ground_truth"))["text"] or "",
            "calls": short_texts([*calls.values()]) if isinstance(calls, dict) else [],
            "picture": None})
    return index["tasks"][key]


def cut(text) -> dict:
    """{"text"} of at most MAX_TEXT characters and {"cut"}: how many are missing. None stays."""
    if text is None or len(str(text)) <= MAX_TEXT:
        return {"text": text if text is None else str(text)}
    return {"text": str(text)[:MAX_TEXT], "cut": len(str(text)) - MAX_TEXT}


def short_texts(values) -> list | None:
    """Strings of at most 500 characters; None stays None; None if `values` is not a list."""
    if not isinstance(values, list):
        return None
    return [None if value is None else str(value)[:500] for value in values]


def ranking(texts, advantages, message: dict) -> list:
    """[(text, advantage, whether it was played)], best first."""
    said = {str(message.get(name)).strip() for name in ("output", "content")
            if message.get(name) is not None}
    rows = [[cut(text)["text"][:2000], plain(advantage), str(text).strip() in said]
            for text, advantage in zip(texts, advantages)]
    return sorted(rows, key=lambda row: -(row[1] if row[1] is not None else -math.inf))


def plain(value) -> float | None:
    return float(f"{value:.4g}") if is_number(value) else None


def address(path, base: str) -> str | None:
    """The relative address of a picture; None unless it is a plain path inside the run folder."""
    path = str(path)
    plain_name = re.fullmatch(r"[^\\:?#\x00-\x1f]+\.(png|jpe?g|webp)", path)
    if not plain_name or path.startswith("/") or ".." in path.split("/"):
        return None
    return quote(os.path.join(base, path).removeprefix("./"), errors="replace")


def first_shown(episodes: list[dict]) -> int:
    """The episode the page opens with: of the first 50, a solved one with credit or candidates."""
    def interest(i):
        e = episodes[i]
        agent = [t for t in e["turns"] if t["role"] == "assistant"]
        credit = [t["advantage"] for t in agent if t.get("advantage") is not None]
        ranked = any("candidates" in t for t in agent)
        return (len(credit) > len(agent) / 2, e["solved"] is True, 4 <= len(agent) <= 7, ranked,
                e["source"] != "base", max(credit, default=0) - min(credit, default=0), -i)
    return max(range(min(len(episodes), 50)), key=interest, default=0)


# ---- answer and hidden information, line by line


def code_of(answer: str) -> str:
    """The fenced code of an answer, or the answer as it is."""
    fenced = re.findall(r"^```[^\n`]*\n(.*?)^```", answer, re.S | re.M)
    return "\n".join(block.rstrip("\n") for block in fenced) if fenced else answer


def line_changes(hidden_info: str, answer: str) -> list:
    """difflib's [(tag, i1, i2, j1, j2)] of the lines without trailing comments and blanks."""
    def lines(text):
        return [re.sub(r"\s*#[^'\"]*$", "", line).rstrip() for line in text.split("\n")]
    one, other = lines(hidden_info), lines(answer)
    if len(one) > MAX_LINES or len(other) > MAX_LINES:  # difflib can take quadratic time
        return [("replace", 0, min(len(one), MAX_LINES), 0, min(len(other), MAX_LINES))]
    return difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("--output", help="(default: report.html in the first RUN)")
    args = parser.parse_args()
    for run in args.runs:
        if not Path(run).is_dir():
            raise UserError(f"{run}: no such folder")
    path = write_report(args.output or Path(args.runs[0]) / "report.html", args.runs)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_main(main)
