"""One HTML file to look at a run: results, training curves, every dialogue with the credit each turn got.

    python -m colbench.look.report runs/tiny              # runs/tiny/report.html, at any time during the run
    python -m colbench.look.report runs/a runs/b          # runs/a/report.html with both runs in every picture

It shows what is there of trajectories.jsonl, preferences.jsonl, the training logs (*_log.jsonl), episodes.jsonl,
metrics.json and advantages.jsonl (colbench.look.credit). The file needs no network and no other file but the
screenshots of pages, which it names by relative paths. The same inputs give the same file.

Everything an LLM wrote is data: JSON in which `<` cannot occur, put into the page as text nodes by the one script of
report_page.html; a content security policy allows that script, by its hash, and nothing else.
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
from colbench.env.data import CREDIT, episode_line, failed, number_samples, state_line, trajectory_line
from colbench.env.evidence import evidence
from colbench.look.table import EVIDENCE, table
from colbench.look.turns import add_turns, is_of, mean, short_name, state_shown
from colbench.run.errors import UserError, run_main
from colbench.run.fields import COUNT, checked, is_number
from colbench.run.files import dialogue_hash, read_so_far, write_aside
from colbench.run.settings import read_json

PAGE = Path(__file__).with_name("report_page.html")
MAX_TEXT = 20_000         # characters of one message or answer that are shown; the rest is counted
MAX_LINES = 400           # lines of a text that are compared
EVALUATION_BYTES = 14.5e6  # JSON of evaluation episodes in one report; what does not fit is left out and counted
TRAINING_BYTES = 4e6      # the same for training trajectories
MAX_TRAINING = 1_000      # trajectories shown, those with ranked candidates first
POINTS = 300              # points of a curve; longer logs are averaged
CURVES = ("loss", "rewards/accuracies", "margin", "margin/nats", "log_ratio/chosen", "log_ratio/rejected")
LOG = {"step": COUNT, "tokens_per_second?": float, "peak_memory_gb?": float}
LINES = {"trajectories": trajectory_line(), "preferences": state_line, "advantages": CREDIT,
         "episodes": episode_line(SimpleNamespace(scores={}), policy=True)}  # of any environment


def write_report(output, runs, metrics=None, episodes=None) -> Path:
    """Write the report of some run folders to `output`. metrics ({policy: what evaluate.py knows of it}) and episodes
    (rows) stand in for the files of the first run. UserError: nothing to show in a folder, or a broken line."""
    output, runs = Path(output), [Path(run) for run in runs]
    data = {"runs": [], "intro": [], "notes": [], "curves": [], "tasks": [], "systems": [], "episodes": [], "first": 0,
            "turns": [], "state": None}
    tables, index = [], {"tasks": {}, "systems": {}}
    for number, run in enumerate(runs):
        files = {name: read_so_far(run / f"{name}.jsonl", kind) for name, kind in LINES.items()}
        files["trajectories"] = number_samples(files["trajectories"])
        logs = {path.name.removesuffix("_log.jsonl"): read_so_far(path, LOG)
                for path in sorted(run.glob("*_log.jsonl"))}
        if episodes is not None and number == 0:
            files["episodes"] = episodes
        if not any(files.values()) and not any(logs.values()):
            raise UserError(f"{run}: nothing to report: no episodes, trajectories, preferences or logs in it")
        name = str(run) if len(runs) > 1 or run.name == "" else run.name
        data["runs"].append(name)
        prefix = f"{name}: " if len(runs) > 1 else ""
        for log, rows in logs.items():  # older runs hold policy logs of other names, such as rft_log.jsonl
            stage = "critic" if log.startswith("critic") else "policy"
            if rows:
                data["curves"].append(curve(stage, prefix + log if log != stage else name, rows))
        files["environment"] = environment_of_run(run)
        found = metrics if metrics and number == 0 else metrics_so_far(run, files["environment"], files["episodes"])
        tables += [(prefix + short_name(policy, run), values) for policy, values in found.items()]
        base = os.path.relpath(run.resolve(), output.resolve().parent)
        add_evaluation(data, index, files, prefix, run, base, EVALUATION_BYTES / len(runs))
        add_training(data, index, files, prefix, run, base, TRAINING_BYTES / len(runs))
        add_turns(data, files, prefix, run)
    data["table"] = table(tables)
    advantages = sorted(abs(a) for e in data["episodes"] for t in e["turns"]
                        for a in [t.get("advantage"), *(c[1] for c in t.get("candidates", []))] if a is not None)
    data["scale"] = advantages[int(0.95 * (len(advantages) - 1))] if advantages else 1.0  # full colour from here on
    data["first"], data["state"] = first_shown(data["episodes"]), state_shown(data["episodes"])
    intro = ("An agent talks with a simulated human who alone knows the reference; only the final answer is scored, by "
             f"{environment_of_run(runs[0]).scored_by}.")
    if advantages:
        intro += (" The signed number beside a message is its advantage A(o, a, c): how much likelier, per token, the "
                  "critic that sees the reference finds it than the base model does.")
    data["intro"].append(intro)
    page = PAGE.read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", page, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("@HASH@", f"sha256-{digest}")
    before, after = page.split("@DATA@")
    write_aside(output, lambda temporary: temporary.write_text(before + embedded(data) + after, encoding="utf-8"))
    return output


def embedded(data) -> str:
    """JSON that can stand in a script element: ASCII (lone surrogates and U+2028 are escapes), no `<`, `>` or `&`."""
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a loss that became NaN: JSON has none
        text = json.dumps(finite(data), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value):
    """`value` with null for every NaN and infinity in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value


# ---- the numbers


def metrics_so_far(run: Path, environment, episodes: list[dict]) -> dict:
    """{policy: metrics} of metrics.json, or where an evaluation is still going on, from its episodes."""
    path = run / "metrics.json"
    if not path.exists():
        return metrics_of_unfinished(environment, episodes, run / "episodes.jsonl")
    found = read_json(path).get("policies", {})
    if not found or not all(isinstance(values, dict) for values in found.values()):
        raise UserError(f"{path}: not what evaluate.py writes; delete it and run evaluate.py again")
    return {name: checked(values, EVIDENCE, f"{path}: policies: {name}") for name, values in found.items()}


def metrics_of_unfinished(environment, episodes: list[dict], path: Path) -> dict:
    """The same of an evaluation that is still going on."""
    if not all(failed(line) or is_of(environment, line) for line in episodes):
        return {}
    by_policy = {}
    for line in episodes:
        by_policy.setdefault(line["policy"], []).append(line)
    beside = evidence(environment, by_policy, path)
    return {policy: environment.metrics(lines) | beside[policy] for policy, lines in by_policy.items()}


# ---- curves


def curve(stage: str, label: str, rows: list[dict]) -> dict:
    """A training log for the page: for each of CURVES the values as logged and their running mean over a twentieth of
    the steps, averaged to at most POINTS points."""
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
    return {"stage": stage, "label": label, "steps": steps, "values": values, "note": ", ".join(facts)}


def buckets(values: list, size: int) -> list:
    means = [mean(values[i:i + size]) for i in range(0, len(values), size)]
    return [None if v is None else float(f"{v:.5g}") for v in means]


# ---- dialogues


def add_evaluation(data, index, files, prefix, run, base, room) -> None:
    """Put the evaluation's episodes into `data`, task by task with all policies, until `room` bytes are used."""
    credit = {(r["policy"], r["id"], r["sample"]): r for r in files["advantages"]}

    def credit_of(line):  # not that of an earlier dialogue under the same name
        row = credit.get((line["policy"], line["id"], line["sample"]))
        return row["turns"] if row and ("dialogue" not in row or row["dialogue"] == dialogue_hash(line)) else None

    by_policy = {}
    for line in files["episodes"]:
        by_policy.setdefault(line["policy"], []).append(line)
    place = {id(line): i for lines in by_policy.values() for i, line in enumerate(lines)}
    lines = sorted(files["episodes"], key=lambda line: place[id(line)])

    def shown(line):
        source = prefix + short_name(line["policy"], run)
        return shown_episode(data, index, files["environment"], line, source, base, credit_of(line), {})

    fitting = fill(data, room, [partial(shown, line) for line in lines])
    if fitting < len(lines):
        data["notes"].append(f"{prefix}{len(lines) - fitting} of {len(lines)} episodes are left out to keep this file "
                             f"small; {run / 'episodes.jsonl'} has them all.")


def fill(data, room: float, makers) -> int:
    """Add episodes to `data` while they and their new tasks fit into `room` bytes of JSON; returns how many fitted."""
    for n, make in enumerate(makers):
        tasks = len(data["tasks"])
        episode = make()
        room -= len(embedded(episode)) + sum(len(embedded(task)) for task in data["tasks"][tasks:])
        if room < 0:
            return n
        data["episodes"].append(episode)
    return n + 1 if makers else 0


def add_training(data, index, files, prefix, run, base, room) -> None:
    """Put training trajectories into `data`, those with ranked candidates first; where their own file is missing, the
    states of preferences.jsonl as they are."""
    ranked = {}
    for row in files["preferences"]:
        if row["candidates"]:
            ranked.setdefault((row["id"], row["sample"]), {})[row["turn"]] = row
    source, lines = prefix + "training", files["trajectories"]
    if not lines:
        source, lines = prefix + "preferences", [
            {"id": row["id"], "sample": row["sample"], "outcome": "", "answer": None,
             "system": system,
             "task": {"problem_description": history[0]["content"], "ground_truth": "", "test_cases": {}},
             "dialogue_history": history + [{"role": "assistant", "content": None}]}
            for of_trajectory in ranked.values() for row in of_trajectory.values()
            for system, history in [apart(row["messages"])]]
    lines = sorted(lines, key=lambda line: (line["id"], line["sample"]) not in ranked)

    def shown(line):
        states = ranked.get((line["id"], line["sample"]), {})
        return shown_episode(data, index, files["environment"], line, source, base, None, states)

    fitting = fill(data, room, [partial(shown, line) for line in lines[:MAX_TRAINING]])
    if fitting < len(lines):
        data["notes"].append(f"{prefix}{fitting} of {len(lines)} training dialogues are shown, those with ranked "
                             "candidates first.")


def apart(messages: list[dict]) -> tuple:
    """(the system prompt or None, the other messages)."""
    has_system = messages[0]["role"] == "system"
    return (messages[0]["content"] if has_system else None), messages[has_system:]


def shown_episode(data, index, environment, line, source, base, credit, ranked) -> dict:
    """One line of episodes.jsonl or trajectories.jsonl as the page shows it. credit: the turns of its line in
    advantages.jsonl; ranked: {turn: line of preferences.jsonl}."""
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
            state = ranked.get(n)
            texts, advantages = (state["candidates"], state["advantages"]) if state else (
                message.get("candidates"), message.get("advantages"))
            if texts and isinstance(advantages, list) and len(texts) == len(advantages):
                turn["candidates"] = ranking(texts, advantages, message)
                played = [c[1] for c in turn["candidates"] if c[2]]
                if played and played[0] is not None:
                    turn["advantage"] = played[0]
            if credit and n <= len(credit):
                turn["advantage"] = plain(credit[n - 1]["advantage"])
                # lengths and hundredths: they are short in the page
                ends = [0, *(end for end, _ in credit[n - 1]["ratios"])]
                turn["tokens_long"] = [max(0, end - start) for start, end in zip(ends, ends[1:])]
                turn["ratios"] = [round(100 * ratio) for _, ratio in credit[n - 1]["ratios"]]
                if credit[n - 1].get("candidates"):
                    turn["candidates"] = ranking(*zip(*credit[n - 1]["candidates"]), message)
        if message.get("leaked"):
            turn["leaked"] = True
        if message["role"] == "user" and turns and task.get("ground_truth") and environment.contradicts(
                task, str(turns[-1]["text"]), message["content"]):
            turn["wrong"] = True
        if message.get("screenshot"):
            turn["picture"] = address(message["screenshot"], base)
        turns.append(turn)
    ours = is_of(environment, line)
    score = environment.details(line) if ours else {}
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
    episode = {"source": source, "task": number, "name": line.get("id") or "", "sample": line.get("sample") or 0,
               "system": system, "outcome": str(line.get("outcome") or "answered")[:200], "reward": line.get("reward"),
               "solved": None, "turns": turns, "leaked": any("leaked" in turn for turn in turns)}
    if failed(line) or ours and "reward" in line:
        episode["ending"] = environment.ending(line)
    if line.get("error") or episode["outcome"].startswith("error"):  # the dialogue broke off
        episode["error"] = cut(line.get("error") or line["outcome"])["text"]
    kept = ("solved", "share", "verdicts", "note", "measure", "official")
    episode |= {name: score[name] for name in kept if name in score}
    if "verdicts" in score:
        episode["got"], expected = short_texts(score.get("got")), short_texts(score.get("expected"))
        if data["tasks"][number].setdefault("expected", expected) != expected:
            episode["expected"] = expected
    elif environment.has_success and "reward" in line:
        episode["solved"] = line["reward"] == 1
    if line.get("answer") and task.get("ground_truth"):
        episode["code"] = code_of(cut(line["answer"])["text"])
        episode["diff"] = line_changes(data["tasks"][number]["reference"], episode["code"])
    return episode


def task_number(data, index, task: dict, name: str, base: str) -> int:
    """The place of a task among the report's, each kept once."""
    key = (name, task["problem_description"], task.get("ground_truth") or "")
    if key not in index["tasks"]:
        index["tasks"][key] = len(data["tasks"])
        calls = task.get("test_cases")
        data["tasks"].append({
            "description": cut(task["problem_description"])["text"],
            "reference": cut(task.get("ground_truth"))["text"] or "",
            "calls": short_texts([*calls.values()]) if isinstance(calls, dict) else [], "picture": None})
    return index["tasks"][key]


def cut(text) -> dict:
    """{"text"} of at most MAX_TEXT characters, with {"cut"}: how many are missing. None stays None."""
    if text is None or len(str(text)) <= MAX_TEXT:
        return {"text": text if text is None else str(text)}
    return {"text": str(text)[:MAX_TEXT], "cut": len(str(text)) - MAX_TEXT}


def short_texts(values) -> list | None:
    """Texts of at most 500 characters; None for what is no list, inside None stays None."""
    return [None if value is None else str(value)[:500] for value in values] if isinstance(values, list) else None


def ranking(texts, advantages, message: dict) -> list:
    """[(text, advantage, whether it was played)], best first."""
    said = {str(message.get(name)).strip() for name in ("output", "content") if message.get(name) is not None}
    rows = [[cut(text)["text"][:2000], plain(advantage), str(text).strip() in said]
            for text, advantage in zip(texts, advantages)]
    return sorted(rows, key=lambda row: -(row[1] if row[1] is not None else -math.inf))


def plain(value) -> float | None:
    return float(f"{value:.4g}") if is_number(value) else None


def address(path, base: str) -> str | None:
    """The relative address of a picture of a run; None for all but a plain file name below the run's folder."""
    path = str(path)
    plain_name = re.fullmatch(r"[^\\:?#\x00-\x1f]+\.(png|jpe?g|webp)", path)
    if not plain_name or path.startswith("/") or ".." in path.split("/"):
        return None
    return quote(os.path.join("." if base == "." else base, path).removeprefix("./"), errors="replace")


def first_shown(episodes: list[dict]) -> int:
    """The episode that the page opens with: of the list's first, a solved dialogue with credit or candidates."""
    def interest(i):
        e = episodes[i]
        agent = [t for t in e["turns"] if t["role"] == "assistant"]
        credit = [t["advantage"] for t in agent if t.get("advantage") is not None]
        ranked = any("candidates" in t for t in agent)
        return (len(credit) > len(agent) / 2, e["solved"] is True, 4 <= len(agent) <= 7, ranked,
                e["source"] != "base", max(credit, default=0) - min(credit, default=0), -i)
    return max(range(min(len(episodes), 50)), key=interest, default=0)


# ---- answer beside reference


def code_of(answer: str) -> str:
    """The fenced code of an answer, or the answer as it is."""
    fenced = re.findall(r"^```[^\n`]*\n(.*?)^```", answer, re.S | re.M)
    return "\n".join(block.rstrip("\n") for block in fenced) if fenced else answer


def line_changes(reference: str, answer: str) -> list:
    """difflib's [(tag, i1, i2, j1, j2)] between the lines of two texts; trailing comments and blanks do not count."""
    def lines(text):
        return [re.sub(r"\s*#[^'\"]*$", "", line).rstrip() for line in text.split("\n")]
    one, other = lines(reference), lines(answer)
    if len(one) > MAX_LINES or len(other) > MAX_LINES:  # difflib takes quadratic time on hostile texts
        return [("replace", 0, min(len(one), MAX_LINES), 0, min(len(other), MAX_LINES))]
    return difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
