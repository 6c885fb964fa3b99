"""The base class of environments: a family of tasks with a simulated human and a score.

Backend Programming and Frontend Design are two subclasses; a file of your own holds a third
(`--env FILE.py`). No script and no other layer asks which one it runs.

A subclass gives tasks, a human and a score. Everything else has a default. In the order of a run:

    tasks, check_task    the tasks, each with its hidden information c
    prompt, presets      the agent's system prompt; defaults of the scripts' flags
    human                who replies to the agent, and alone sees c
    answer               when an episode ends, and with which answer
    score                the reward of an answer, 0 to 1; 1 is success
    metrics, columns     what evaluate.py counts and prints
    ending, contradicts  how an episode ended, in words; whether a human's reply contradicts c
"""
import importlib.util
import re
import sys
from pathlib import Path

from colbench.env.data import check_texts, failed, read_tasks
from colbench.env.dialogue import answer_of
from colbench.env.metrics import bootstrap, dialogue_metrics, success_rate
from colbench.run.errors import UserError
from colbench.run.settings import read_json

RIGHT = "right"  # the ending of a solved episode
# what servers say when the context is full
CONTEXT_FULL = r"context|too long|too many tokens|token count|tokens? (limit|exceed)|must be <="


def percent(name: str):
    """A column: the share `name` in percent."""
    return lambda m: f"{m[name]:.1%}"


def interval(name: str):
    """A column: the 95 % interval of the share `name`."""
    return lambda m: "{:.1%} .. {:.1%}".format(*m[name + "_95"])


class Environment:
    """The environment of one run: `with Env(args) as env:`.

    args: the script's flags; folder: where the environment may write files.
    """

    # the system prompt; {max_turns} is filled in
    prompt = "Ask what you need to know, then answer."
    # script (collect, train_critic, train_policy, evaluate) -> preset -> {flag: default}
    presets = {}
    columns = {  # heading -> text of the cell, from a policy's metrics
        "success": percent("success"),
        "95 % interval": interval("success"),
        "reward": lambda m: f"{m['reward']:.3f}",
        "turns": lambda m: f"{m['turns']:.1f}",
        "tokens/msg": lambda m: f"{m['tokens_per_message']:.1f}",
        "at limit": percent("answered_at_limit"),
        "n": lambda m: str(m["episodes"]),
        "errors": lambda m: str(m["errors"])}
    scored_by = "the environment"  # for the report's first sentence
    # what colbench.look.comparison compares
    measures = {"success": lambda line: line["reward"] == 1, "reward": lambda line: line["reward"]}
    # fields of the details that metrics and measures read: kinds, see colbench/run/fields.py
    scores = {}
    # can an answer be fully right? Needed by rejection fine-tuning, --critic value, --official
    has_success = True

    def __init__(self, args, folder="."):
        self.args, self.folder = args, Path(folder)

    def __enter__(self):
        """Start what playing and scoring need, such as a sandbox or a browser."""
        return self

    def __exit__(self, *_):
        """Stop it."""

    @classmethod
    def add_flags(cls, parser, stage: str) -> None:
        """Add the flags of this environment alone to the script `stage`."""

    # ---- tasks

    @classmethod
    def check_task(cls, row: dict, where: str) -> dict:
        """The task in a row of a file: {"id", "problem_description", "ground_truth" (c), ...}.

        The dialogue starts with problem_description. UserError, which starts with `where`
        (FILE:LINE), if the row is not a task.
        """
        return check_texts(row, where)

    @classmethod
    def tasks(cls, source: str, limit: int | None = None) -> list[dict]:
        """The first `limit` tasks of `source` (--tasks): a file, hub data set or your own name."""
        return read_tasks(source, cls.check_task, limit)

    # ---- an episode

    def human(self, spec: str, chat=None):
        """The human for --human: anything with reply(tasks, histories, seeds) -> list of strings.

        See colbench.env.humans. chat: the base model, for a human that it plays.
        """
        name = type(self).__name__
        raise UserError(f"{name}: this environment has no human; give it a method `human`")

    def answer(self, history: list[dict], last_turn: bool) -> str | None:
        """The answer if the agent's latest message ends the episode, else None.

        The last turn always ends it.
        """
        return answer_of(history, last_turn)

    def published_answer(self, trajectory: dict) -> str:
        """The answer in a published trajectory."""
        return trajectory["answer"]

    def score(self, pairs: list[tuple[dict, str]]):
        """Yield (reward, a dict of details to keep) for each (task, answer), in order."""
        name = type(self).__name__
        raise UserError(f"{name}: this environment has no score; give it a method `score`")

    # ---- what people look at

    def plan(self) -> dict:
        """Lines of the plan that is printed before playing."""
        return {}

    @classmethod
    def metrics(cls, lines: list[dict]) -> dict:
        """The metrics of one policy; intervals are NAME_95. Failed dialogues are only counted."""
        sound = [line for line in lines if not failed(line)]
        rewards = [line["reward"] for line in sound]
        tasks = [line["id"] for line in sound]
        return {"episodes": len(sound), "errors": len(lines) - len(sound),
                **success_rate([r == 1 for r in rewards], tasks),
                "reward": sum(rewards) / max(1, len(sound)), "reward_95": bootstrap(rewards, tasks),
                **dialogue_metrics(sound)}

    @classmethod
    def ending(cls, line: dict) -> str:
        """How an episode ended, in a few words of this environment; "right" counts as solved.

        It may look at the task and the dialogue, and is less specific if they do not tell.
        """
        if failed(line):
            error = str(line.get("error", line["outcome"]))
            if error.startswith("human"):
                return "simulator failed"
            full = re.search(CONTEXT_FULL, error, re.IGNORECASE)
            return "context full" if full else "agent failed"
        if cls.has_success and line["reward"] == 1:
            return RIGHT
        if line.get("outcome") == "limit":
            return "at the limit"
        return "wrong" if cls.has_success else "answered"

    @classmethod
    def contradicts(cls, task: dict, question: str, reply: str) -> bool | None:
        """Whether the human's reply to the agent's message contradicts c; None: cannot tell."""
        return None

    def evaluation(self, by_policy: dict[str, list[dict]], tasks: list[dict], before: dict) -> dict:
        """The new content of metrics.json: {"policies": {policy: metrics}, ...}.

        before: its old content.
        """
        return {"policies": {policy: self.metrics(lines) for policy, lines in by_policy.items()}}

    def remarks(self, evaluation: dict, tasks: list[dict]) -> list[str]:
        """Lines to print below the table."""
        return []

    @staticmethod
    def details(line: dict) -> dict:
        """How report.html shows the score of an episode; see colbench/look/report.py.

        {"share" (a string), "measure" (its name), "note", "verdicts", ...}
        """
        if not isinstance(line.get("reward"), (int, float)):
            return {}
        return {"share": f"{line['reward']:.2f}", "measure": "reward"}


def load_environment(spec: str) -> type[Environment]:
    """The class for --env: backend, frontend or FILE.py. UserError if there is none."""
    if spec == "backend":
        from colbench.env.backend.environment import Backend
        return Backend
    if spec == "frontend":
        from colbench.env.frontend.environment import Frontend
        return Frontend
    path = Path(spec)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--env {spec}: expected backend, frontend or an existing FILE.py")
    name = f"environment_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        sys.modules[name] = module
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--env {spec}: does not load: {type(error).__name__}: {error}") from None
    classes = [value for value in vars(module).values() if isinstance(value, type)
               and issubclass(value, Environment) and value.__module__ == name]
    if len(classes) != 1:
        raise UserError(f"--env {spec}: expected one class that extends "
                        f"colbench.env.base.Environment, got {len(classes)}")
    return classes[0]


def environment_of_run(run: Path) -> type[Environment]:
    """The class that a run folder was made with; the base class if its file is gone."""
    for prefix in ("episodes", "trajectories", ""):
        for path in sorted(Path(run).glob(f"{prefix}*_args.json")):
            if spec := read_json(path).get("env"):
                try:
                    return load_environment(spec)
                except UserError:
                    return Environment
    return load_environment("backend")
