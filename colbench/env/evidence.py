"""What one asks about a success rate before trusting it: does it hold over repetitions, what did it
cost, how did the episodes end, was the simulated human right?

Everything except the clock is a function of the lines of episodes.jsonl. The clock (seconds, and
requests to servers) is in episodes_clock.jsonl, one line per batch of finished episodes, because no
two runs agree on it.
"""
import time
from collections import Counter

from colbench.env.base import RIGHT
from colbench.env.data import failed
from colbench.env.metrics import mean_95, pass_at, pass_hat, smallest_difference
from colbench.run.fields import COUNT
from colbench.run.files import append_jsonl, read_so_far, repair_jsonl

SPENT = ("agent_read", "agent_written", "human_read", "human_written")
CLOCK = {"policy": str, "episodes": COUNT, "seconds": float, "requests": COUNT, "retries": COUNT}


def evidence(environment, by_policy: dict[str, list[dict]], episodes) -> dict[str, dict]:
    """Per policy, what metrics.json has in addition to the environment's own metrics.

    by_policy: the lines of the file `episodes`.

    endings       {label: episodes}; labels are the environment's (`ending`)
    human         {"replies", "empty", "cut"} and, if the environment can tell, "contradicting":
                  the number of replies, then shares of them
    tokens        {"agent_read", "agent_written", "human_read", "human_written"}, each
                  {"all", "per_episode", "per_solved"}. One that no message has is missing.
                  "uncounted": how many of the agent's messages have no counts
    clock         {"seconds", "requests", "retries"}, each as in "tokens"
    repetitions   with several episodes per task:
                  [{"k", "tasks", "pass^k", "pass^k_95", "pass@k", "pass@k_95"}, ...]
    could_have_shown  see that function
    """
    shown = could_have_shown(environment, by_policy) if by_policy else {}
    result = {}
    for policy, lines in by_policy.items():
        result[policy] = _of_policy(environment, policy, lines, episodes)
        if policy in shown:
            result[policy]["could_have_shown"] = shown[policy]
    return result


def _of_policy(environment, policy, lines, episodes):
    endings = Counter(map(environment.ending, lines))
    ordered = sorted(endings.items(), key=lambda item: (item[0] != RIGHT, -item[1], item[0]))
    result = {"endings": dict(ordered),
              "human": human_checks(environment, lines),
              "tokens": tokens_spent(lines, endings[RIGHT]),
              "clock": clock_of(episodes, policy, endings[RIGHT])}
    if environment.has_success and (rows := repetitions(environment, lines)):
        result["repetitions"] = rows
    return result


def repetitions(environment, lines: list[dict]) -> list[dict]:
    """pass^k and pass@k for k up to 8, and for the largest number of episodes that a task has.

    [] if no task has two episodes.
    """
    wins = {}
    for line in lines:
        if not failed(line):
            wins.setdefault(line["id"], []).append(environment.ending(line) == RIGHT)
    counts = [(sum(of_task), len(of_task)) for of_task in wins.values()]
    most = max([n for _, n in counts], default=0)
    rows = []
    for k in sorted({k for k in range(1, most + 1) if k <= 8 or k == most}):
        with_k = [(c, n) for c, n in counts if n >= k]
        row = {"k": k, "tasks": len(with_k)}
        for name, estimate in (("pass^k", pass_hat), ("pass@k", pass_at)):
            values = [estimate(c, n, k) for c, n in with_k]
            row[name] = sum(values) / len(values)
            row[f"{name}_95"] = mean_95(values, range(len(values)))
        rows.append(row)
    return rows if len(rows) > 1 else []


def tokens_spent(lines: list[dict], solved: int) -> dict:
    """Tokens read and written by both, see `evidence`. A prompt counts each time it is read."""
    totals, uncounted = Counter(), 0
    for line in lines:
        for message in line["dialogue_history"][1:]:
            who = "agent" if message["role"] == "assistant" else "human"
            written = message.get("written", message.get("tokens"))
            if written is None or "read" not in message:
                uncounted += who == "agent"
            else:
                totals.update({f"{who}_read": message["read"], f"{who}_written": written})
    costs = {name: per(totals[name], len(lines), solved) for name in SPENT if name in totals}
    return costs | ({"uncounted": uncounted} if uncounted else {})


def per(total, episodes: int, solved: int) -> dict:
    """{"all", "per_episode", "per_solved"} of a cost; the last is None if nothing was solved."""
    return {"all": total, "per_episode": total / max(1, episodes),
            "per_solved": total / solved if solved else None}


def human_checks(environment, lines: list[dict]) -> dict:
    """Shares of the human's replies, see `evidence`, and the 95 % interval of "contradicting"."""
    replies, wrong, tasks = [], [], []
    for line in lines:
        history = line["dialogue_history"]
        for question, reply in zip(history[1:], history[2:]):
            if reply["role"] == "user" and question["role"] == "assistant":
                replies.append(reply)
                contradicts = environment.contradicts(
                    line["task"], question["content"], reply["content"])
                if contradicts is not None:
                    wrong.append(contradicts)
                    tasks.append(line["id"])
    n = max(1, len(replies))
    result = {"replies": len(replies),
              "empty": sum(not reply["content"].strip() for reply in replies) / n,
              "cut": sum(bool(reply.get("cut")) for reply in replies) / n}
    if wrong:
        result["contradicting"] = sum(wrong) / len(wrong)
        result["contradicting_95"] = mean_95(wrong, tasks)
    return result


# ---- comparisons


def could_have_shown(environment, by_policy: dict[str, list[dict]]) -> dict:
    """{policy: {"measure", "to", "difference": the smallest detectable true difference}}

    To the first policy, on the episodes that both played. A single policy is compared with another
    evaluation of the same size. A policy whose outcomes do not vary is left out.
    """
    name, measure = next(iter(environment.measures.items()))
    values = {policy: {(line["id"], line["sample"]): float(measure(line))
                       for line in lines if not failed(line)}
              for policy, lines in by_policy.items()}
    first, *others = values
    shown = {}
    for policy in others or [first]:
        keys = [key for key in values[policy] if key in values[first]]
        differences = [values[policy][key] - (values[first][key] if others else 0) for key in keys]
        tasks = [task for task, _ in keys]
        least = smallest_difference(differences, tasks, samples=1 if others else 2)
        if least is not None:
            shown[policy] = {"measure": " ".join(name.split()), "difference": least,
                             "to": first if others else "another evaluation of this size"}
    return shown


# ---- the clock


class Clock:
    """Writes what each batch of episodes took.

    chats: agent and human; those that are servers count their requests and retries.
    """

    def __init__(self, episodes, policy: str, chats):
        self.path, self.policy = clock_file(episodes), policy
        self.servers = [chat for chat in dict.fromkeys(chats) if hasattr(chat, "retries")]
        if not episodes.exists() or not episodes.stat().st_size:  # a new evaluation
            self.path.unlink(missing_ok=True)
        repair_jsonl(self.path, CLOCK)
        self.last = time.monotonic(), 0, 0

    def batch(self, episodes: int) -> None:
        """Record that `episodes` episodes were played, scored and written since the last call."""
        now = (time.monotonic(), sum(server.requests for server in self.servers),
               sum(server.retries for server in self.servers))
        seconds, requests, retries = (new - old for new, old in zip(now, self.last))
        append_jsonl(self.path, {
            "policy": self.policy, "episodes": episodes, "seconds": round(seconds, 3),
            "requests": requests, "retries": retries})
        self.last = now


def clock_file(episodes):
    """The clock file of an episodes.jsonl."""
    return episodes.with_name(episodes.name.removesuffix(".jsonl") + "_clock.jsonl")


def clock_of(episodes, policy: str, solved: int) -> dict:
    """{"seconds", "requests", "retries"} of a policy, each {"all", "per_episode", "per_solved"}.

    Summed over an episodes.jsonl and its shards. Without servers only "seconds"; {} if unknown.
    Seconds are summed over machines, without loading models and without what a kill lost.
    """
    path = clock_file(episodes)
    parts = [path, *sorted(path.parent.glob(path.name.replace("_clock", "-*of*_clock")))]
    rows = [row for part in parts for row in read_so_far(part, CLOCK) if row["policy"] == policy]
    sums = {name: sum(row[name] for row in rows) for name in ("seconds", "requests", "retries")}
    n = sum(row["episodes"] for row in rows)
    return {name: per(round(total, 3), n, solved) for name, total in sums.items()
            if n and (name == "seconds" or sums["requests"])}


# ---- for people


def evidence_remarks(policies: dict[str, dict]) -> list[str]:
    """Lines below evaluate.py's table: pass^k, detectable differences, costs, wrong replies."""
    repeated = {name: m["repetitions"][-1] for name, m in policies.items() if "repetitions" in m}
    shown = {name: m["could_have_shown"] for name, m in policies.items() if "could_have_shown" in m}
    costs = {name: cost_text(m["tokens"], m["clock"]) for name, m in policies.items()}
    parts = {
        "all of k episodes right (pass^k), at least one (pass@k)": [
            f"{name} {row['pass^k']:.1%}, {row['pass@k']:.1%} (k = {row['k']})"
            for name, row in repeated.items()],
        "smallest detectable difference": [
            f"{name} {row['difference']:.1%} {row['measure']} to {row['to']}"
            for name, row in shown.items()],
        "per episode": [f"{name} {text}" for name, text in costs.items() if text],
        "human replies that contradict the hidden information": [
            f"{name} {m['human']['contradicting']:.1%}" for name, m in policies.items()
            if m["human"].get("contradicting")]}
    return [f"{title}: {'; '.join(texts)}" for title, texts in parts.items() if texts]


def cost_text(tokens: dict, clock: dict) -> str:
    """What an episode cost, in a few words."""
    def total(way):
        return sum(tokens[name]["per_episode"] for name in SPENT
                   if name.endswith(way) and name in tokens)

    parts = []
    if "agent_read" in tokens:
        parts.append(f"{total('read'):,.0f} tokens read, {total('written'):,.0f} written")
    if "seconds" in clock:
        parts.append(f"{clock['seconds']['per_episode']:.2g} s")
    if clock.get("retries", {}).get("all"):
        parts.append(f"{clock['retries']['all']} requests sent again in total")
    return ", ".join(parts)
