"""Frontend Design: the agent shows web pages; the score is how similar two pictures are.

The human sees pictures of the agent's page and of the hidden page.
"""
import re
from functools import partial

from colbench.env.base import Environment, percent
from colbench.env.data import check_texts, read_tasks
from colbench.env.dialogue import answer_of
from colbench.env.frontend.browser import Renderer
from colbench.env.frontend.human import make_page_human
from colbench.env.frontend.pages import SIZES, page_tasks
from colbench.env.frontend.protocol import EDITS_PROMPT, PAGE_PROMPT, final_page, page_shown
from colbench.env.frontend.score import make_measure
from colbench.env.metrics import bootstrap, dialogue_metrics
from colbench.run.errors import UserError
from colbench.run.fields import COUNT
from colbench.run.files import read_jsonl

TINY = "tiny-frontend"  # the embedded model for the page language, colbench/env/frontend/tiny
PLAY = {
    "tiny": dict(model=TINY, n_tasks=60, measure="pixels", page_language="edits",
                 agent_prompt=EDITS_PROMPT, max_new_tokens=24, parallel=64),
    "llama": dict(human=None, measure="clip", page_language="html", max_new_tokens=4096),
}


class Frontend(Environment):
    """`score` renders the answer and the hidden page offline and compares the two pictures."""

    prompt = PAGE_PROMPT
    presets = {
        "collect": {"tiny": PLAY["tiny"] | dict(tasks="pages:train", k=5, candidate_share=0.3),
                    "llama": PLAY["llama"] | dict(tasks="data/frontend_tasks/train.jsonl",
                                                  n_tasks=1000, k=6)},
        "train_critic": {"tiny": dict(model=TINY, tokens_per_step=2048, max_tokens=2048,
                                      epochs=2, learning_rate=3e-4, pairs_per_task=4),
                         "llama": dict(max_tokens=16384, tokens_per_step=16384)},
        "train_policy": {"tiny": dict(model=TINY, learning_rate=3e-4, epochs=2),
                         "llama": dict(max_tokens=16384, tokens_per_step=16384)},
        "evaluate": {"tiny": PLAY["tiny"] | dict(tasks="pages:test"),
                     "llama": PLAY["llama"] | dict(tasks="data/frontend_tasks/test.jsonl",
                                                   n_tasks=500)},
    }
    columns = {
        "similarity": lambda m: f"{m['similarity']:.3f}",
        "95 % interval": lambda m: "{:.3f} .. {:.3f}".format(*m["similarity_95"]),
        "win rate": lambda m: f"{m['against']['win_rate']:.1%}" if "against" in m else "",
        "95 % interval ": lambda m: (
            "{:.1%} .. {:.1%}".format(*m["against"]["win_rate_95"]) if "against" in m else ""),
        "ties": lambda m: f"{m['against']['ties']:.1%}" if "against" in m else "",
        "turns": Environment.columns["turns"],
        "at limit": Environment.columns["at limit"],
        "no page": percent("no_page"),
        "n": Environment.columns["n"],
        "errors": Environment.columns["errors"],
    }
    measures = {"similarity": lambda line: line["scores"]["similarity"]}
    scores = {"similarity": float, "measure": str, "renderer": str}
    has_success = False
    scored_by = "the similarity of its picture to the hidden page"

    @classmethod
    def add_flags(cls, parser, stage):
        group = parser.add_argument_group("frontend")
        if stage in ("collect", "evaluate"):
            group.add_argument("--measure", help="the reward: clip (openai/clip-vit-base-patch32), "
                               "the id or folder of another CLIP, or pixels, which needs no model")
            group.add_argument("--page-language", choices=("html", "edits"), default="html",
                               help="what the agent writes: HTML pages, or lines of the page "
                               "language of the bundled tasks")
            group.add_argument("--extraction", choices=("published", "tolerant"),
                               default="published", help="which part of a message is the page: "
                               "as in the released code, or the last page in any spelling")
        if stage == "evaluate":
            group.add_argument("--against", metavar="FILE[#POLICY]", help="win rate against these "
                               "episodes of another run (default: the first of --policies)")
        if stage == "train_critic":
            group.add_argument("--vision-critic", metavar="MODEL", help="with --critic regression, "
                               "as in the paper: put the head on this vision-language model, which "
                               "sees both pages (default: a text critic)")

    def __init__(self, args, folder="."):
        super().__init__(args, folder)
        page = dict(language=getattr(args, "page_language", "html"),
                    rule=getattr(args, "extraction", "published"))
        self.page_shown = partial(page_shown, **page)
        self.final_page = partial(final_page, **page)
        if getattr(args, "against", None):
            load_opponent(args.against)  # report a bad one before playing

    def __enter__(self):
        human = self.args.human
        if not human:
            raise UserError("--human: Frontend Design needs one that sees pictures; give scripted, "
                            "the address of a server with a vision model, or the name of a vision "
                            "model to run here")
        self.measure = make_measure(self.args.measure)
        self.renderer = Renderer(self.folder / "screenshots", layout=human == "scripted")
        return self

    def __exit__(self, *_):
        self.renderer.close()

    @classmethod
    def check_task(cls, row, where):
        task = check_texts(row, where)
        if not re.search(r"<\s*(html|head|body|div|link)\b", task["ground_truth"], re.IGNORECASE):
            raise UserError(f"{where}: ground_truth: not a page; --env frontend needs HTML")
        return task

    @classmethod
    def tasks(cls, source, limit=None):
        if not str(source).startswith("pages:"):
            return read_tasks(source, cls.check_task, limit)
        split = str(source)[len("pages:"):]
        if split not in SIZES:
            raise UserError(f"{source}: no such tasks; use pages:train or pages:test")
        return page_tasks(split, SIZES[split] if limit is None else limit)

    def human(self, spec, chat=None):
        return make_page_human(spec, self.renderer, self.page_shown)

    def answer(self, history, last_turn):
        """The last page shown, "" if there was none; None if the episode continues."""
        if answer_of(history, last_turn) is None:
            return None
        return self.final_page(history) or ""

    def published_answer(self, trajectory):
        # the published answer is only a path on its authors' disk
        return self.final_page(trajectory["dialogue_history"]) or ""

    def score(self, pairs):
        """Yield (similarity, scores) of each (task, answer).

        scores: similarity, measure, renderer, screenshot, reference_screenshot (of the hidden page)
        and, for an answer that counts as a black picture, note: why. Paths are relative to the
        JSONL file. UserError: the hidden page cannot be rendered.
        """
        pages = [answer or None for _, answer in pairs]
        pages += [task["ground_truth"] for task, _ in pairs]
        pictures = self.renderer.render(pages)
        answers, hidden_pages = pictures[:len(pairs)], pictures[len(pairs):]
        for (task, _), hidden_page in zip(pairs, hidden_pages):
            if not hidden_page.path:
                raise UserError(f"task {task['id']}: its hidden page cannot be rendered "
                                f"({hidden_page.refusal}); leave the task out")
        paths = [(answer.path, hidden.path) for answer, hidden in zip(answers, hidden_pages)]
        values = self.measure.similarities(paths) if pairs else []
        for value, answer, hidden_page in zip(values, answers, hidden_pages):
            scores = {
                "similarity": value,
                "measure": self.measure.name,
                "renderer": self.renderer.fingerprint,
                "screenshot": _relative(answer.path),
                "reference_screenshot": _relative(hidden_page.path),
            }
            if not answer.path:
                scores["note"] = answer.refusal
            yield value, scores

    def plan(self):
        return {"sandbox": f"{self.renderer.fingerprint}; {self.renderer.layers}",
                "reward": self.measure.name}

    @classmethod
    def metrics(cls, lines, opponent=None):
        """similarity, no_page (share of answers without a picture) and the like.

        opponent: episodes of another policy; adds the win rate against them.
        """
        sound = [line for line in lines if "scores" in line]
        values = [line["scores"]["similarity"] for line in sound]
        n = max(1, len(sound))
        result = {
            "episodes": len(sound),
            "errors": len(lines) - len(sound),
            "similarity": sum(values) / n,
            "similarity_95": bootstrap(values, [line["id"] for line in sound]),
            "no_page": sum(not line["scores"].get("screenshot") for line in sound) / n,
            **dialogue_metrics(sound),
            "measure": sorted({line["scores"]["measure"] for line in sound}),
            "renderer": sorted({line["scores"]["renderer"] for line in sound}),
        }
        if opponent is not None:
            result["against"] = win_rate(sound, opponent)
        return result

    @classmethod
    def ending(cls, line):
        label = super().ending(line)
        return "no page" if "scores" in line and not line["scores"].get("screenshot") else label

    def evaluation(self, by_policy, tasks, before):
        first = next(iter(by_policy))
        against = getattr(self.args, "against", None)
        opponent = load_opponent(against) if against else by_policy[first]
        policies = {policy: self.metrics(lines, opponent if against or policy != first else None)
                    for policy, lines in by_policy.items()}
        renderers = {line["scores"]["renderer"] for lines in (opponent, *by_policy.values())
                     for line in lines if "renderer" in line.get("scores", ())}
        return {"opponent": against or first, "renderers": sorted(renderers), "policies": policies}

    def remarks(self, evaluation, tasks):
        measures = sorted({name for m in evaluation["policies"].values() for name in m["measure"]})
        lines = [f"similarity: {', '.join(measures)}; "
                 f"win rate against {evaluation['opponent']}, ties count half",
                 f"all pictures are in {self.folder / 'screenshots'}"]
        if len(evaluation["renderers"]) > 1:
            lines.append("warning: these episodes were rendered with different browsers, flags or "
                         "fonts; do not compare their similarities")
        return lines

    @staticmethod
    def details(line):
        scores = line.get("scores") or {}
        if not isinstance(scores.get("similarity"), (int, float)):
            return {}
        return {
            "share": f"{scores['similarity']:.3f}",
            "measure": scores.get("measure"),
            "note": scores.get("note"),
            "picture": scores.get("screenshot"),
            "reference_picture": scores.get("reference_screenshot"),
        }


def _relative(path) -> str | None:
    return f"{path.parent.name}/{path.name}" if path else None


def win_rate(mine: list[dict], others: list[dict]) -> dict:
    """How often an episode of `mine` is closer to the hidden page than its partner in `others`.

    Partners have the same task and sample. A tie (difference below 1e-6) is half a win.
    "without_partner" counts the episodes of `mine` that are left out: no partner, or one failed.
    """
    opponents = {(line["id"], line["sample"]): line["scores"]["similarity"]
                 for line in others if "scores" in line}
    compared = [line for line in mine
                if "scores" in line and (line["id"], line["sample"]) in opponents]
    pairs = [(line["scores"]["similarity"], opponents[line["id"], line["sample"]])
             for line in compared]
    points = [0.5 if abs(a - b) < 1e-6 else float(a > b) for a, b in pairs]
    n = max(1, len(points))
    return {
        "win_rate": sum(points) / n,
        "win_rate_95": bootstrap(points, [line["id"] for line in compared]),
        "wins": points.count(1.0) / n,
        "ties": points.count(0.5) / n,
        "n": len(points),
        "without_partner": len(mine) - len(points),
    }


def load_opponent(path: str) -> list[dict]:
    """The episodes of another run, given as `FILE` or `FILE#POLICY`.

    UserError: no such file or policy, or several policies and none given.
    """
    path, _, policy = path.partition("#")
    lines = read_jsonl(path, {"id": str, "sample": COUNT, "policy?": str,
                              "scores?": {"similarity": float, "renderer?": str}})
    if not lines:
        raise UserError(f"{path}: no episodes; give the episodes.jsonl of another run")
    policies = list(dict.fromkeys(line.get("policy", "") for line in lines))
    if policy or len(policies) > 1:
        if policy not in policies:
            raise UserError(f"{path}: holds {', '.join(policies)}; "
                            f"name one of them, as in {path}#{policies[0]}")
        lines = [line for line in lines if line.get("policy") == policy]
    return lines
