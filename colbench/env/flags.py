"""The scripts' flags: the first three, those that several scripts have, and checks of what was given."""
import argparse
import sys

from colbench.env.base import Environment, load_environment
from colbench.run.errors import UserError
from colbench.run.settings import default_run, read_json, settings_file
from colbench.run.shards import shard


class Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the default behind the words about each flag."""

    def _get_help_string(self, action):
        known = not any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        known = known and "default" not in action.help
        return action.help + " (default: %(default)s)" * known


def script_parser(doc: str, stage: str, presets: dict, first=None) -> tuple[argparse.ArgumentParser, type[Environment]]:
    """The parser of a stage script with --preset, --env and --run, and the environment's class. The defaults of all
    flags are those of presets[preset], over which the environment's own stand. first: a parser whose flags are looked
    at beforehand too."""
    first = first or argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets, default="tiny", help="settings for a CPU or a 24 GB card; "
                       "other flags win over them")
    first.add_argument("--env", default="backend", help="backend (Backend Programming), frontend (Frontend Design), "
                       "or an environment of your own, FILE.py")
    known = first.parse_known_args()[0]
    environment = load_environment(known.env)
    parser = argparse.ArgumentParser(description=doc, parents=[first], allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--run", help="directory of this run")
    defaults = {"run": default_run(known.preset, known.env)} | presets[known.preset]
    if stage in ("collect", "evaluate"):
        defaults["agent_prompt"] = environment.prompt
    parser.preset = defaults | environment.presets.get(stage, {}).get(known.preset, {})
    return parser, environment


def parse_flags(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, set[str]]:
    """(the flags, the names of those that stand on the command line). The preset's defaults are over those of single
    flags."""
    parser.set_defaults(**parser.preset)
    words = {word.partition("=")[0] for word in sys.argv[1:]}
    given = {action.dest for action in parser._actions if words & set(action.option_strings)}
    return parser.parse_args(), given


def add_playing_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """The flags that collect.py and evaluate.py have in common: which tasks, how the agent samples, who the human
    is."""
    output = {"collect": "trajectories", "evaluate": "episodes"}[stage]
    group = parser.add_argument_group("tasks")
    group.add_argument("--tasks", help="a .jsonl file, a data set on the hub, ID:train or ID:test, or a name that the "
                       "environment knows")
    group.add_argument("--n-tasks", type=int, help="the first so many tasks")
    group.add_argument("--shard", metavar="I/N", type=shard, default="1/1", help="only every N-th task from the I-th "
                       f"on, into {output}-IofN.jsonl; the N files put together are a whole run's")
    group = parser.add_argument_group("playing")
    group.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help="NF4 weights")
    group.add_argument("--agent-prompt", help="system prompt; {max_turns} is filled in (default: the environment's)")
    group.add_argument("--temperature", type=float, default=1.0, help="of the agent's sampling")
    group.add_argument("--max-new-tokens", type=int, help="bound on one message")
    group.add_argument("--batch-tokens", type=int, help="tokens held at once while sampling; lower it when memory "
                       "runs out")
    group.add_argument("--max-turns", type=int, default=10, help="agent messages, the answer included")
    group.add_argument("--human", help="scripted, self (the base model's weights), a server's address, "
                       "http://HOST:PORT/v1#NAME (without #NAME the first model it lists), or what else the "
                       "environment knows")
    group.add_argument("--parallel", type=int, help="dialogues in flight")


def check_playing_flags(args, more: str = "") -> None:
    """UserError for values of these flags that cannot work. more: names of others that are at least 1."""
    at_least_one(args, f"k n_tasks max_turns parallel max_new_tokens batch_tokens {more}")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature}: is 0 or more")


def load_tasks(args, environment: type[Environment]) -> list[dict]:
    """The tasks of --tasks, --n-tasks and --shard; a task twice is one. UserError where one lacks a field."""
    tasks = {}
    for number, task in enumerate(environment.tasks(args.tasks, args.n_tasks), 1):
        for field in ("id", "problem_description", "ground_truth"):
            if not isinstance(task.get(field), str):
                raise UserError(f"--env {args.env}: task {number}: {field}: a text is wanted")
        tasks[task["id"]] = task
    return list(tasks.values())[args.shard[0] - 1::args.shard[1]]


def refuse_unused(given: set[str], because: str, names: str) -> None:
    """UserError where one of the flags `names` is on the command line though another flag leaves it nothing to do."""
    for name in names.split():
        if name in given:
            raise UserError(f"--{name.replace('_', '-')} has no effect with {because}: leave one of them out")


def at_least_one(args, names: str) -> None:
    """UserError where one of the flags `names` is below 1."""
    for name in names.split():
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: is at least 1")


def played_with(args, environment: type[Environment]) -> dict:
    """The flags of collect.py that the trajectories of a training script were made with, as they lie beside them; for
    trajectories made elsewhere the preset's."""
    known = dict(human="scripted", max_new_tokens=96, batch_tokens=65536) if args.preset == "tiny" else dict(
        human="self", max_new_tokens=1024, batch_tokens=32768)
    known |= environment.presets.get("collect", {}).get(args.preset, {})
    return known | read_json(settings_file(args.trajectories))
