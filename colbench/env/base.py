"""What SWEET-RL has to know of a family of tasks: one small class. Backend Programming and Frontend Design are two
fillings of it, a file of your own is a third (`--env FILE.py`). No script and no other room asks which one it is.

A filling gives tasks, a human and a score; all else has a default. In the order in which a run meets them:

    tasks, check_task    what is to be done, and the hidden reference c
    prompt, presets      what the agent is told; defaults of the scripts' flags
    human                who replies to the agent, and alone sees c
    answer               when an episode ends, and with which answer
    score                the reward of an answer, 0 to 1; 1 is success
    metrics, columns     what evaluate.py counts and prints
    ending, contradicts  how an episode ended, in words; whether a reply of the human's cannot be true
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

RIGHT = "right"  # the ending of an episode that counts as solved
CONTEXT_FULL = r"context|too long|too many tokens|token count|tokens? (limit|exceed)|must be <="  # in servers' words


def percent(name: str):
    """A column: the share `name` in per cent."""
    return lambda m: f"{m[name]:.1%}"


def interval(name: str):
    """A column: the 95 % interval of the share `name`."""
    return lambda m: "{:.1%} .. {:.1%}".format(*m[name + "_95"])


class Environment:
    """One run's environment, `with Env(args) as env:`. args: the script's flags; folder: where its files may lie."""

    prompt = "Ask what you need to know, then answer."  # the system prompt; {max_turns} is filled in
    presets = {}  # stage (collect, train_critic, train_policy, evaluate) -> preset (tiny, llama) -> {flag: default}
    columns = {  # heading -> function of a policy's metrics that gives the text
        "success": percent("success"), "95 % interval": interval("success"), "reward": lambda m: f"{m['reward']:.3f}",
        "turns": lambda m: f"{m['turns']:.1f}", "tokens/msg": lambda m: f"{m['tokens_per_message']:.1f}",
        "at limit": percent("answered_at_limit"),
        "n": lambda m: str(m["episodes"]), "errors": lambda m: str(m["errors"])}
    scored_by = "the environment"  # how an answer is scored, for the report's first sentence
    # what comparisons of runs compare
    measures = {"success": lambda line: line["reward"] == 1, "reward": lambda line: line["reward"]}
    # what metrics and measures read of the details: fields and their kinds (colbench/run/fields.py), for files
    scores = {}
    # whether an answer can be wholly right: rejection fine-tuning, --critic value and --official learn from these
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
        """Add the flags that only this environment has, to the script `stage`."""

    # ---- tasks

    @classmethod
    def check_task(cls, row: dict, where: str) -> dict:
        """The task in a row of a file: {"id", "problem_description" (the agent's and the human's first message),
        "ground_truth" (c), ...}. UserError that begins with `where` (FILE:LINE) if it is none."""
        return check_texts(row, where)

    @classmethod
    def tasks(cls, source: str, limit: int | None = None) -> list[dict]:
        """The first `limit` tasks of `source`, the flag --tasks: a file, a data set on the hub, or a name you chose."""
        return read_tasks(source, cls.check_task, limit)

    # ---- an episode

    def human(self, spec: str, chat=None):
        """Who replies, for the flag --human: anything with reply(tasks, histories, seeds) -> list of texts, see
        colbench.env.humans. chat: the base model, for a human that it plays."""
        raise UserError(f"{type(self).__name__}: this environment has no human; give it a method `human`")

    def answer(self, history: list[dict], last_turn: bool) -> str | None:
        """The answer, if the agent's latest message ends the episode; None if it goes on. The last turn ends it."""
        return answer_of(history, last_turn)

    def published_answer(self, trajectory: dict) -> str:
        """The answer of a trajectory that was made elsewhere."""
        return trajectory["answer"]

    def score(self, pairs: list[tuple[dict, str]]):
        """Yield (reward, what else is kept about it: a dict) of each (task, answer), in order."""
        raise UserError(f"{type(self).__name__}: this environment has no score; give it a method `score`")

    # ---- what people look at

    def plan(self) -> dict:
        """Lines of the block that is printed before playing."""
        return {}

    @classmethod
    def metrics(cls, lines: list[dict]) -> dict:
        """What is reported about one policy: numbers, intervals as NAME_95. Broken dialogues are only counted."""
        sound = [line for line in lines if not failed(line)]
        rewards, tasks = [line["reward"] for line in sound], [line["id"] for line in sound]
        return {"episodes": len(sound), "errors": len(lines) - len(sound),
                **success_rate([r == 1 for r in rewards], tasks),
                "reward": sum(rewards) / max(1, len(sound)), "reward_95": bootstrap(rewards, tasks),
                **dialogue_metrics(sound)}

    @classmethod
    def ending(cls, line: dict) -> str:
        """How an episode ended, in a few words of this environment; "right" counts as solved, whatever else there is.
        It may look at the task and the dialogue, and says less where these do not tell."""
        if failed(line):
            error = str(line.get("error", line["outcome"]))
            if error.startswith("human"):
                return "simulator failed"
            return "context full" if re.search(CONTEXT_FULL, error, re.IGNORECASE) else "agent failed"
        if cls.has_success and line["reward"] == 1:
            return RIGHT
        return "at the limit" if line.get("outcome") == "limit" else "wrong" if cls.has_success else "answered"

    @classmethod
    def contradicts(cls, task: dict, question: str, reply: str) -> bool | None:
        """Whether the human's reply to the agent's message contradicts c. None: this environment cannot tell."""
        return None

    def evaluation(self, by_policy: dict[str, list[dict]], tasks: list[dict], before: dict) -> dict:
        """What metrics.json holds: {"policies": {policy: metrics}} and more. before: what the file held."""
        return {"policies": {policy: self.metrics(lines) for policy, lines in by_policy.items()}}

    def remarks(self, evaluation: dict, tasks: list[dict]) -> list[str]:
        """Lines below the table."""
        return []

    @staticmethod
    def details(line: dict) -> dict:
        """How report.html shows the score of an episode: {"share" (a text), "measure" (what of), "note", "verdicts",
        ...}, see colbench/look/report.py."""
        if not isinstance(line.get("reward"), (int, float)):
            return {}
        return {"share": f"{line['reward']:.2f}", "measure": "reward"}


def load_environment(spec: str) -> type[Environment]:
    """The class for --env: backend, frontend, or the one that a file defines. UserError if there is none."""
    if spec == "backend":
        from colbench.env.backend.environment import Backend
        return Backend
    if spec == "frontend":
        from colbench.env.frontend.environment import Frontend
        return Frontend
    path = Path(spec)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--env {spec}: backend, frontend or an existing FILE.py is wanted")
    name = f"environment_{path.stem}"
    module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location(name, path))
    try:
        sys.modules[name] = module
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--env {spec}: does not load: {type(error).__name__}: {error}") from None
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Environment)
               and value.__module__ == name]
    if len(classes) != 1:
        raise UserError(f"--env {spec}: one class that extends colbench.env.base.Environment is wanted, "
                        f"there are {len(classes)}")
    return classes[0]


def environment_of_run(run: Path) -> type[Environment]:
    """The class that a run folder was made with, by its settings; the plain contract if a person's own file is gone."""
    kinds = ("episodes", "trajectories", "")
    for path in [path for kind in kinds for path in sorted(Path(run).glob(f"{kind}*_args.json"))]:
        if spec := read_json(path).get("env"):
            try:
                return load_environment(spec)
            except UserError:
                return Environment
    return load_environment("backend")
