"""Backend Programming: the agent writes a Python function; only the human knows its details.

Hidden test calls score the answer.
"""
import re

from colbench.env.backend.audit import flaws
from colbench.env.backend.human import contradicts, make_human
from colbench.env.backend.mini import details_of
from colbench.env.backend.score import Scorer, share, success
from colbench.env.backend.tasks import check_task, load_tasks
from colbench.env.base import Environment, percent
from colbench.env.data import failed
from colbench.env.dialogue import MARKER
from colbench.env.metrics import bootstrap, dialogue_metrics, leak_rate, success_rate
from colbench.run.fields import COUNT

HUB = "facebook/collaborative_agent_bench"
TINY_PROMPT = "Ask about one missing detail at a time, then answer."


def fixed_percent(name: str):
    return lambda m: f"{m['fixed'][name]:.1%}"


class Backend(Environment):
    """`score` runs the hidden calls in a sandbox and keeps both verdicts, see score.py."""

    prompt = (
        "You help a person to write a Python function. Their request leaves out details that only "
        "they know, so find out before you write code: ask short, simple questions, one at a time, "
        "about inputs, outputs, rules, units and special cases. They answer in a sentence or two. "
        "You have {max_turns} messages in all, the answer included. As soon as you know enough, "
        f"send one message that begins with \"{MARKER}\" followed by the complete Python code and "
        "nothing else."
    )
    presets = {
        "collect": {
            "tiny": dict(tasks="mini:train", agent_prompt=TINY_PROMPT),
            "llama": dict(tasks=f"{HUB}:train", human="self"),
        },
        "evaluate": {
            "tiny": dict(tasks="mini:test", agent_prompt=TINY_PROMPT),
            "llama": dict(tasks=f"{HUB}:test", human="self"),
        },
    }
    columns = {
        "success": fixed_percent("success"),
        "95 % interval": lambda m: "{:.1%} .. {:.1%}".format(*m["fixed"]["success_95"]),
        "official": lambda m: f"{m['official']['success']:.1%}",
        "tests passed": fixed_percent("tests_passed"),
        "turns": Environment.columns["turns"],
        "tokens/msg": Environment.columns["tokens/msg"],
        "at limit": Environment.columns["at limit"],
        "leaks": percent("leak_rate"),
        "n": Environment.columns["n"],
        "errors": Environment.columns["errors"],
    }
    measures = {
        f"{mode:8}  {name:12}": lambda line, f=f, mode=mode: f(line["scores"], mode)
        for mode in ("fixed", "official")
        for name, f in (("success", success), ("tests passed", share))
    }
    scores = {
        "fixed": {"passed": COUNT, "total": COUNT,
                  "calls?": [str], "expected?": list, "got?": list},
        "official": {"passed": COUNT, "total": COUNT},
        "sandbox": str,
        "note?": str,
    }
    scored_by = "hidden test calls"
    check_task = staticmethod(check_task)
    tasks = staticmethod(load_tasks)
    contradicts = staticmethod(contradicts)

    @classmethod
    def add_flags(cls, parser, stage):
        if stage == "collect":
            parser.add_argument("--scorer", choices=("fixed", "official"), default="fixed",
                                help="take the reward from our scorer (fixed) or from the released "
                                "code's (official) (default: fixed)")
        if stage in ("collect", "evaluate"):
            parser.add_argument("--allow-weak-sandbox", action="store_true",
                                help="score even if the sandbox cannot be made safe")

    def __enter__(self):
        self.scorer = Scorer(allow_weak=getattr(self.args, "allow_weak_sandbox", False))
        return self

    def __exit__(self, *_):
        self.scorer.close()

    def human(self, spec, chat=None):
        return make_human(spec, chat)

    def score(self, pairs):
        for result in self.scorer.score_many(pairs):
            yield share(result, getattr(self.args, "scorer", "fixed")), result

    def plan(self):
        return {"sandbox": self.scorer.tier,
                "reward": f"share of tests passed, {getattr(self.args, 'scorer', 'fixed')} scorer"}

    @classmethod
    def metrics(cls, lines, flawed=None):
        """Success and tests passed by both scorers, and leak_rate.

        flawed: ids of tasks in which audit.py finds faults; adds success on the other tasks.
        """
        sound = [line for line in lines if not failed(line)]
        n = max(1, len(sound))
        ids = [line["id"] for line in sound]
        result = {"episodes": len(sound), "errors": len(lines) - len(sound)}
        for mode in ("fixed", "official"):
            shares = [share(line["scores"], mode) for line in sound]
            result[mode] = success_rate([success(line["scores"], mode) for line in sound], ids) | {
                "tests_passed": sum(shares) / n,
                "tests_passed_95": bootstrap(shares, ids),
            }
        if flawed is not None:
            clean = [line for line in sound if line["id"] not in flawed]
            wins = [success(line["scores"], "fixed") for line in clean]
            clean_ids = [line["id"] for line in clean]
            result["clean_tasks"] = {"episodes": len(clean)} | success_rate(wins, clean_ids)
        return result | dialogue_metrics(sound) | {
            "leak_rate": leak_rate(sound),
            "sandbox": sorted({line["scores"]["sandbox"] for line in sound}),
        }

    @classmethod
    def ending(cls, line):
        """How an episode ended. The mini benchmark also gives the reason for a wrong answer.

        The human gave a wrong number, had not given all the numbers yet, or had given all of them.
        """
        label = super().ending(line)
        details = details_of(line["task"]["ground_truth"]) if label == "wrong" else None
        if details is None:
            return label
        history = line["dialogue_history"]
        replies = [m["content"] for m in history[1:] if m["role"] == "user"]
        if any(contradicts(line["task"], question["content"], reply["content"])
               for question, reply in zip(history[1:], history[2:]) if reply["role"] == "user"):
            return "misled by the human"
        all_told = all(
            any(re.search(rf"\b{name}\b", reply) and re.search(rf"\b{number}\b", reply)
                for reply in replies)
            for name, number in details.items())
        return "wrong though all was told" if all_told else "answered too early"

    def evaluation(self, by_policy, tasks, before):
        allow_weak = getattr(self.args, "allow_weak_sandbox", False)
        audit = flaws(tasks, before.get("audit"), allow_weak)
        policies = {policy: self.metrics(lines, audit["flawed"])
                    for policy, lines in by_policy.items()}
        return {"audit": audit, "policies": policies}

    def remarks(self, evaluation, tasks):
        n = len(tasks)
        flawed = len(evaluation["audit"]["flawed"])
        rates = ", ".join(f"{policy} {m['clean_tasks']['success']:.1%}"
                          for policy, m in evaluation["policies"].items())
        return [f"{n - flawed} of {n} tasks are clean (python -m colbench.env.backend.audit lists "
                f"the others); success on these: {rates}"]

    @staticmethod
    def details(line):
        scores = line.get("scores") or {}
        fixed, official = scores.get("fixed"), scores.get("official")
        if not isinstance(fixed, dict) or "total" not in fixed:
            return {}
        shown = {
            "solved": 0 < fixed["total"] == fixed["passed"],
            "share": f"{fixed['passed']}/{fixed['total']}",
            "verdicts": fixed.get("calls"),
            "got": fixed.get("got"),
            "expected": fixed.get("expected"),
            "note": scores.get("note"),
        }
        if isinstance(official, dict):
            shown["official"] = f"{official['passed']}/{official['total']}"
        return shown
