"""Frontend Design as the scripts see it: what a dialogue's page is, who reviews it, how it is scored. Flags, presets, win rate."""
import argparse
import json
from functools import partial
from pathlib import Path

from colbench.compare import bootstrap
from colbench.files import UserError, read_jsonl, write_aside
from colbench.frontend.browser import Renderer
from colbench.frontend.humans import make_page_human
from colbench.server import shown
from colbench.frontend.protocol import EDITS_PROMPT, PAGE_PROMPT, final_page, page_shown
from colbench.frontend.reward import make_measure

TINY = "tiny-frontend"  # the embedded model of the page language, colbench/frontend/tiny
# what `--env frontend` changes in a script's presets
PRESETS = {
    "collect": {
        "tiny": dict(run="runs/tiny-frontend", model=TINY, tasks="pages:train", n_tasks=60, k=5, candidate_share=0.3, measure="pixels",
                     page_language="edits", agent_prompt=EDITS_PROMPT, max_new_tokens=24, parallel=64),
        "llama": dict(run="runs/llama-frontend", tasks="data/frontend_tasks/train.jsonl", n_tasks=1000, k=6, human=None,
                      measure="clip", page_language="html", agent_prompt=PAGE_PROMPT, max_new_tokens=4096),
    },
    "train_critic": {
        "tiny": dict(run="runs/tiny-frontend", model=TINY, tokens_per_step=2048, max_tokens=2048, epochs=2, min_gap=0.1,
                     learning_rate=3e-4, pairs_per_task=4, page_language="edits"),
        "llama": dict(run="runs/llama-frontend", page_language="html", agent_prompt=PAGE_PROMPT, max_tokens=16384,
                      tokens_per_step=16384, min_gap=0.1),
    },
    "train_policy": {
        "tiny": dict(run="runs/tiny-frontend", model=TINY, min_gap=0.1, learning_rate=3e-4, nll_weight=1.0, gap=0.2, epochs=2),
        "llama": dict(run="runs/llama-frontend", min_gap=0.1, max_tokens=16384, tokens_per_step=16384),
    },
    "evaluate": {
        "tiny": dict(run="runs/tiny-frontend", model=TINY, tasks="pages:test", n_tasks=60, measure="pixels", page_language="edits",
                     agent_prompt=EDITS_PROMPT, max_new_tokens=24, parallel=64),
        "llama": dict(run="runs/llama-frontend", tasks="data/frontend_tasks/test.jsonl", n_tasks=500, human=None, measure="clip",
                      page_language="html", agent_prompt=PAGE_PROMPT, max_new_tokens=4096),
    },
}


def add_env(parser: argparse.ArgumentParser) -> str:
    """Add `--env` to the first look at the arguments; returns its value."""
    parser.add_argument("--env", choices=("backend", "frontend"), default="backend",
                        help="Backend Programming or Frontend Design (default: %(default)s)")
    return parser.parse_known_args()[0].env


def add_flags(parser: argparse.ArgumentParser):
    """The flags of collect.py and evaluate.py that only Frontend Design has."""
    group = add_page_flags(parser)
    group.add_argument("--measure", help="the reward: clip (openai/clip-vit-base-patch32), another CLIP's id or folder, or pixels, "
                       "which needs no weights (default: pixels with --preset tiny, clip with llama)")
    return group


def add_page_flags(parser: argparse.ArgumentParser):
    """The flags that say what a page in a message is."""
    group = parser.add_argument_group("frontend")
    group.add_argument("--page-language", choices=("html", "edits"), default="html", help="what the agent writes: pages, or lines "
                       "of the bundled tasks' own page language (default: %(default)s)")
    group.add_argument("--extraction", choices=("published", "tolerant"), default="published", help="which part of a message is "
                       "the page: as in the released code, or the last one in any spelling (default: %(default)s)")
    group.add_argument("--tabs", type=int, default=2, help="pages rendered at once (default: %(default)s)")
    return group


class Frontend:
    """Browser, measure and human of one run. Has `score_many` like colbench.scorer.Scorer; its results have "similarity"."""

    def __init__(self, args, folder: Path):
        if not args.human:
            raise UserError("--human: Frontend Design needs one that sees pictures: scripted, the address of a server with a vision "
                            "model, or the name of a vision model to run here")
        self.measure = make_measure(args.measure)
        self.renderer = Renderer(Path(folder) / "screenshots", layout=args.human == "scripted", tabs=args.tabs)
        self.shown = partial(page_shown, language=args.page_language, rule=args.extraction)
        self.final_page = partial(final_page, language=args.page_language, rule=args.extraction)
        try:
            self.human = make_page_human(args.human, self.renderer, self.shown, args.human_model)
        except BaseException:
            self.renderer.close()
            raise
        self.tier = f"{self.renderer.fingerprint}; {self.renderer.layers}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.renderer.close()

    def score_many(self, pairs):
        """The result of each (task, answer), answer: a page or "". {"similarity", "measure", "renderer", "screenshot",
        "reference_screenshot"} with paths relative to the JSONL file; "note" says why a page counts as the black picture."""
        pictures = self.renderer.render([answer or None for _, answer in pairs] + [task["ground_truth"] for task, _ in pairs])
        answers, references = pictures[:len(pairs)], pictures[len(pairs):]
        for (task, _), reference in zip(pairs, references):
            if not reference.path:
                raise UserError(f"task {task['id']}: its page cannot be rendered ({reference.refusal}); leave the task out")
        values = self.measure.similarities([(a.path, b.path) for a, b in zip(answers, references)]) if pairs else []
        for value, answer, reference in zip(values, answers, references):
            yield {"similarity": value, "measure": self.measure.name, "renderer": self.renderer.fingerprint,
                   "screenshot": _relative(answer.path), "reference_screenshot": _relative(reference.path),
                   **({} if answer.path else {"note": answer.refusal})}


def _relative(path) -> str | None:
    return f"{path.parent.name}/{path.name}" if path else None


# ------------------------------------------------------------------------------------------------------------ report


def win_rate(mine: list[dict], others: list[dict]) -> dict:
    """How often an episode of `mine` is closer to the reference than the other run's of the same task and sample. A tie (difference
    below 1e-6) is half a win. Episodes that only one side has, or that broke off, are left out and counted in "without_partner"."""
    there = {(line["id"], line["sample"]): line["scores"]["similarity"] for line in others if "scores" in line}
    mine_too = [line for line in mine if "scores" in line and (line["id"], line["sample"]) in there]
    pairs = [(line["scores"]["similarity"], there[line["id"], line["sample"]]) for line in mine_too]
    points = [0.5 if abs(a - b) < 1e-6 else float(a > b) for a, b in pairs]
    n = max(1, len(points))
    return {"win_rate": sum(points) / n, "win_rate_95": bootstrap(points, [line["id"] for line in mine_too]),
            "wins": points.count(1.0) / n, "ties": points.count(0.5) / n, "n": len(points), "without_partner": len(mine) - len(points)}


def load_opponent(path: str) -> list[dict]:
    """The episodes of another run, `FILE` or `FILE#POLICY`. UserError: no such file or policy, or several policies and none named."""
    path, _, policy = path.partition("#")
    lines = read_jsonl(path, ("id", "sample"))
    policies = list(dict.fromkeys(line.get("policy", "") for line in lines))
    if policy or len(policies) > 1:
        if policy not in policies:
            raise UserError(f"{path}: holds {', '.join(policies)}; name one of them, as in {path}#{policies[0]}")
        lines = [line for line in lines if line.get("policy") == policy]
    if any("similarity" not in line.get("scores", {"similarity": 0}) for line in lines):
        raise UserError(f"{path}: these are no episodes of Frontend Design")
    return lines


def metrics_of(lines: list[dict], opponent: list[dict] | None = None) -> dict:
    """All that is reported about one policy; episodes that ended in an error are left out and counted."""
    sound = [line for line in lines if "scores" in line]
    values, n = [line["scores"]["similarity"] for line in sound], max(1, len(sound))
    said = [m for line in sound for m in line["dialogue_history"] if m["role"] == "assistant"]
    tokens = [m["tokens"] for m in said if m.get("tokens") is not None]
    result = {"episodes": len(sound), "errors": len(lines) - len(sound), "similarity": sum(values) / n,
              "similarity_95": bootstrap(values, [line["id"] for line in sound]),
              "no_page": sum(not line["scores"]["screenshot"] for line in sound) / n, "turns": len(said) / n,
              "tokens_a_message": sum(tokens) / max(1, len(tokens)),
              "answered_at_limit": sum(line["outcome"] == "limit" for line in sound) / n,
              "measure": sorted({line["scores"]["measure"] for line in sound}),
              "renderer": sorted({line["scores"]["renderer"] for line in sound})}
    return result | ({"against": win_rate(sound, opponent)} if opponent is not None else {})


def report(args, lines: list[dict], order: list[tuple]) -> dict:
    """Write metrics.json and print the table; returns {policy: metrics}. The opponent of the win rate: --against, else the first policy of this run."""
    wanted = set(order)
    of = {policy: [x for x in lines if x["policy"] == policy and (policy, x["id"], x["sample"]) in wanted]
          for policy in args.names.values()}
    first = next(iter(of))
    opponent = load_opponent(args.against) if args.against else of[first]
    results = {policy: metrics_of(of[policy], opponent if args.against or policy != first else None) for policy in of}
    settings = {name: str(value) if isinstance(value, Path) else shown(value) for name, value in vars(args).items()}
    text = json.dumps({"settings": settings, "opponent": args.against or first, "policies": results}, indent=1)
    write_aside(args.metrics, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    width = max(len(policy) for policy in results)
    print(f"\nsimilarity: {', '.join(sorted({m for r in results.values() for m in r['measure']}))}; win rate against "
          f"{args.against or first}, ties count half")
    print(f"{'':{width}}  {'similarity':>10}  {'95 % interval':>16}  {'win rate':>8}  {'95 % interval':>15}  {'ties':>5}  "
          f"{'turns':>5}  {'at limit':>8}  {'no page':>7}  {'n':>4}  {'errors':>6}")
    for policy, m in results.items():
        low, high = m["similarity_95"]
        a = m.get("against")
        wins = f"{a['win_rate']:8.1%}  {a['win_rate_95'][0]:7.1%} ..{a['win_rate_95'][1]:6.1%}  {a['ties']:5.1%}" if a else " " * 32
        print(f"{policy:{width}}  {m['similarity']:10.3f}  {low:7.3f} ..{high:6.3f}  {wins}  {m['turns']:5.1f}  "
              f"{m['answered_at_limit']:8.1%}  {m['no_page']:7.1%}  {m['episodes']:4d}  {m['errors']:6d}")
    if len({r for m in results.values() for r in m["renderer"]} | {x["scores"]["renderer"] for x in opponent if "scores" in x}) > 1:
        print("warning: these episodes were rendered by different browsers, flags or fonts; their similarities do not compare")
    print(f"\n{args.episodes.parent / 'screenshots'} has every picture")
    return results
