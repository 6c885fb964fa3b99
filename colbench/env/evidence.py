"""What one asks of a rate before one trusts it: does it hold over repetitions, what did it cost, how did the episodes
end, was the simulated human right.

All but the clock is a function of the lines of episodes.jsonl. The clock, seconds and a server's requests, is kept
beside them, a line for each batch of finished episodes, in episodes_clock.jsonl: no two runs agree on it.
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
    """What metrics.json holds of each policy beside the environment's own metrics. by_policy: lines of the file at the
    path `episodes`, which the clock stands beside.

    endings       {label: episodes}, by the environment's `ending`
    human         {"replies", "empty", "cut"} and, where the environment can tell, "contradicting": shares of replies
    tokens        {"agent_read", "agent_written", "human_read", "human_written"}: {"all", "per_episode", "per_solved"};
                  one is missing where no message has it, and "uncounted" says how many messages have none
    clock         {"seconds", "requests", "retries"}, as "tokens"
    repetitions   with several episodes a task: [{"k", "tasks", "pass^k", "pass^k_95", "pass@k", "pass@k_95"}, ...]
    could_have_shown  see there
    """
    shown = could_have_shown(environment, by_policy) if by_policy else {}
    return {policy: _of_policy(environment, policy, lines, episodes)
            | ({"could_have_shown": shown[policy]} if policy in shown else {}) for policy, lines in by_policy.items()}


def _of_policy(environment, policy, lines, episodes):
    endings = Counter(map(environment.ending, lines))
    found = {"endings": dict(sorted(endings.items(), key=lambda item: (item[0] != RIGHT, -item[1], item[0]))),
             "human": human_checks(environment, lines), "tokens": tokens_spent(lines, endings[RIGHT]),
             "clock": clock_of(episodes, policy, endings[RIGHT])}
    if environment.has_success and (rows := repetitions(environment, lines)):
        found["repetitions"] = rows
    return found


def repetitions(environment, lines: list[dict]) -> list[dict]:
    """pass^k and pass@k for k from 1 to 8, and for the most episodes that a task has; [] where that is one."""
    wins = {}
    for line in lines:
        if not failed(line):
            wins.setdefault(line["id"], []).append(environment.ending(line) == RIGHT)
    counts, rows = [(sum(of_task), len(of_task)) for of_task in wins.values()], []
    most = max([n for _, n in counts], default=0)
    for k in sorted({k for k in range(1, most + 1) if k <= 8 or k == most}):
        there = [(c, n) for c, n in counts if n >= k]
        row = {"k": k, "tasks": len(there)}
        for name, estimate in (("pass^k", pass_hat), ("pass@k", pass_at)):
            values = [estimate(c, n, k) for c, n in there]
            row |= {name: sum(values) / len(values), f"{name}_95": mean_95(values, range(len(values)))}
        rows.append(row)
    return rows if len(rows) > 1 else []


def tokens_spent(lines: list[dict], solved: int) -> dict:
    """Tokens read and written by both, see `evidence`: prompts are counted as often as they were read."""
    totals, uncounted = Counter(), 0
    for line in lines:
        for message in line["dialogue_history"][1:]:
            who = "agent" if message["role"] == "assistant" else "human"
            written = message.get("written", message.get("tokens"))
            if written is None or "read" not in message:
                uncounted += who == "agent"
            else:
                totals.update({f"{who}_read": message["read"], f"{who}_written": written})
    found = {name: per(totals[name], len(lines), solved) for name in SPENT if name in totals}
    return found | ({"uncounted": uncounted} if uncounted else {})


def per(total, episodes: int, solved: int) -> dict:
    """{"all", "per_episode", "per_solved"} of a cost; None a solved one where none was."""
    return {"all": total, "per_episode": total / max(1, episodes), "per_solved": total / solved if solved else None}


def human_checks(environment, lines: list[dict]) -> dict:
    """Shares of the human's replies, see `evidence`; with the 95 % interval of "contradicting"."""
    replies, wrong, tasks = [], [], []
    for line in lines:
        history = line["dialogue_history"]
        for question, reply in zip(history[1:], history[2:]):
            if reply["role"] == "user" and question["role"] == "assistant":
                replies.append(reply)
                told = environment.contradicts(line["task"], question["content"], reply["content"])
                if told is not None:
                    wrong.append(told)
                    tasks.append(line["id"])
    n = max(1, len(replies))
    found = {"replies": len(replies), "empty": sum(not reply["content"].strip() for reply in replies) / n,
             "cut": sum(bool(reply.get("cut")) for reply in replies) / n}
    return found | ({"contradicting": sum(wrong) / len(wrong), "contradicting_95": mean_95(wrong, tasks)}
                    if wrong else {})


# ---- comparisons


def could_have_shown(environment, by_policy: dict[str, list[dict]]) -> dict:
    """{policy: {"measure", "to", "difference": the smallest true one that this comparison would have found}}

    To the first policy, on the episodes that both played; of a policy that is alone, to another evaluation of its size.
    A policy is left out where no outcome differs from another.
    """
    name, measure = next(iter(environment.measures.items()))
    values = {policy: {(line["id"], line["sample"]): float(measure(line)) for line in lines if not failed(line)}
              for policy, lines in by_policy.items()}
    first, *others = values
    found = {}
    for policy in others or [first]:
        keys = [key for key in values[policy] if key in values[first]]
        differences = [values[policy][key] - (values[first][key] if others else 0) for key in keys]
        least = smallest_difference(differences, [task for task, _ in keys], samples=1 if others else 2)
        if least is not None:
            found[policy] = {"measure": " ".join(name.split()), "difference": least,
                             "to": first if others else "another evaluation of this size"}
    return found


# ---- the clock


class Clock:
    """Appends what a batch of episodes took. chats: who was asked, servers among them count requests and retries."""

    def __init__(self, episodes, policy: str, chats):
        self.path, self.policy = clock_file(episodes), policy
        self.servers = [chat for chat in dict.fromkeys(chats) if hasattr(chat, "retries")]
        if not episodes.exists() or not episodes.stat().st_size:  # begun anew
            self.path.unlink(missing_ok=True)
        repair_jsonl(self.path, CLOCK)
        self.before = time.monotonic(), 0, 0

    def batch(self, episodes: int) -> None:
        """These many episodes were played, scored and written since the last call."""
        now = time.monotonic(), sum(s.requests for s in self.servers), sum(s.retries for s in self.servers)
        seconds, requests, retries = (new - old for new, old in zip(now, self.before))
        append_jsonl(self.path, {"policy": self.policy, "episodes": episodes, "seconds": round(seconds, 3),
                                 "requests": requests, "retries": retries})
        self.before = now


def clock_file(episodes):
    """Where the clock of an episodes.jsonl stands."""
    return episodes.with_name(episodes.name.removesuffix(".jsonl") + "_clock.jsonl")


def clock_of(episodes, policy: str, solved: int) -> dict:
    """{"seconds", "requests", "retries"}: {"all", "per_episode", "per_solved"} of a policy in an episodes.jsonl and in
    the shards that were put together in it; without a server only "seconds", {} where nothing is known. Seconds are
    those of all machines, without loading models and without what a kill lost."""
    path = clock_file(episodes)
    parts = [path, *sorted(path.parent.glob(path.name.replace("_clock", "-*of*_clock")))]
    rows = [row for part in parts for row in read_so_far(part, CLOCK) if row["policy"] == policy]
    sums = {name: sum(row[name] for row in rows) for name in ("seconds", "requests", "retries")}
    n = sum(row["episodes"] for row in rows)
    return {name: per(round(total, 3), n, solved) for name, total in sums.items()
            if n and (name == "seconds" or sums["requests"])}


# ---- for people


def evidence_remarks(policies: dict[str, dict]) -> list[str]:
    """Lines below evaluate.py's table: pass^k, what could have been shown and what it cost, a human that was wrong."""
    repeated = {name: m["repetitions"][-1] for name, m in policies.items() if "repetitions" in m}
    shown = {name: m["could_have_shown"] for name, m in policies.items() if "could_have_shown" in m}
    parts = {
        "all of k episodes right (pass^k), any of them (pass@k)": [
            f"{name} {row['pass^k']:.1%}, {row['pass@k']:.1%} (k = {row['k']})" for name, row in repeated.items()],
        "smallest difference that could be shown": [
            f"{name} {row['difference']:.1%} {row['measure']} to {row['to']}" for name, row in shown.items()],
        "an episode": [
            f"{name} {text}" for name, m in policies.items() if (text := cost_text(m["tokens"], m["clock"]))],
        "replies of the human that contradict the reference": [
            f"{name} {m['human']['contradicting']:.1%}" for name, m in policies.items()
            if m["human"].get("contradicting")]}
    return [f"{title}: {'; '.join(texts)}" for title, texts in parts.items() if texts]


def cost_text(tokens: dict, clock: dict) -> str:
    """What an episode cost, in a few words."""
    def total(way):
        return sum(tokens[name]["per_episode"] for name in SPENT if name.endswith(way) and name in tokens)
    parts = [f"{total('read'):,.0f} tokens read, {total('written'):,.0f} written"] if "agent_read" in tokens else []
    parts += [f"{clock['seconds']['per_episode']:.2g} s"] if "seconds" in clock else []
    parts += [f"{clock['retries']['all']} requests sent again"] if clock.get("retries", {}).get("all") else []
    return ", ".join(parts)
