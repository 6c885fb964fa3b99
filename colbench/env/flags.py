"""The scripts' flags: the first three, those that several scripts have, and checks of both."""
import argparse
import json
import os
import sys
import textwrap

from colbench.env.base import Environment, load_environment
from colbench.run.errors import UserError
from colbench.run.settings import default_run, hide_password, read_json, settings_file
from colbench.run.shards import shard


class Help(argparse.RawDescriptionHelpFormatter):
    """Prints the docstring as it is, and the default after the help of each flag."""

    def _get_help_string(self, action):
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if hidden or "default" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"


def script_parser(doc: str, stage: str, presets: dict,
                  first=None) -> tuple[argparse.ArgumentParser, type[Environment]]:
    """The parser of a stage script with --preset, --env and --run, and the environment's class.

    The defaults of all flags are presets[preset]; the environment's own presets override them.
    first: a parser whose flags are read beforehand too.
    """
    first = first or argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=presets, default="tiny", help="settings for a CPU or a "
                       "24 GB GPU; other flags override them")
    first.add_argument("--env", default="backend", help="backend (Backend Programming), frontend "
                       "(Frontend Design), or an environment of your own, FILE.py")
    args = first.parse_known_args()[0]
    environment = load_environment(args.env)
    parser = argparse.ArgumentParser(description=doc, parents=[first], allow_abbrev=False,
                                     formatter_class=Help)
    parser.add_argument("--run", help="folder of this run")
    defaults = {"run": default_run(args.preset, args.env)} | presets[args.preset]
    if stage in ("collect", "evaluate"):
        defaults["agent_prompt"] = environment.prompt
    parser.own = environment.presets.get(stage, {}).get(args.preset, {})
    parser.preset = defaults | parser.own
    return parser, environment


def parse_flags(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, set[str]]:
    """(the flags, the names of those on the command line)."""
    parser.set_defaults(**parser.preset)  # they override the defaults of single flags
    return parser.parse_args(), given_flags(parser)


def given_flags(parser: argparse.ArgumentParser) -> set[str]:
    """The names of the flags on the command line."""
    words = {word.partition("=")[0] for word in sys.argv[1:]}
    return {action.dest for action in parser._actions if words & set(action.option_strings)}


def print_settings(parser: argparse.ArgumentParser, args) -> None:
    """Print what every flag resolved to and where its value comes from; main process only."""
    if os.environ.get("RANK", "0") != "0":
        return
    sources = {"command line": given_flags(parser), f"env {args.env}": set(parser.own),
               f"preset {args.preset}": set(parser.preset), "default": vars(args).keys()}
    printed = {"help", "preset", "env"}
    print("\nsettings")
    known = [action.dest for action in parser._actions] + [*parser.preset]
    for source, names in sources.items():
        found = [name for name in dict.fromkeys(known) if name in names and name not in printed]
        printed |= {*found}
        texts = [f"{name}={shown(getattr(args, name))}" for name in found]
        lines = textwrap.wrap("  ".join(texts), 78, break_on_hyphens=False, break_long_words=False)
        for label, line in zip([source] + [""] * len(lines), lines):
            print(f"  {label:18}  {line}")


def shown(value) -> str:
    """A flag's value in one line, without passwords of addresses."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    value = hide_password(value)
    if isinstance(value, str) and " " in value:
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def add_playing_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """Add the flags that collect.py and evaluate.py share."""
    output = {"collect": "trajectories", "evaluate": "episodes"}[stage]
    group = parser.add_argument_group("tasks")
    group.add_argument("--tasks", help="a .jsonl file, a data set on the hub, ID:train or ID:test, "
                       "or a name that the environment knows")
    group.add_argument("--n-tasks", type=int, help="use only the first tasks")
    group.add_argument("--shard", metavar="I/N", type=shard, default="1/1", help="only every N-th "
                       f"task from the I-th on, into {output}-IofN.jsonl; the N files concatenated "
                       "make a whole run")
    group = parser.add_argument_group("playing")
    group.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, help="NF4 weights")
    group.add_argument("--agent-prompt", help="system prompt; {max_turns} is filled in (default: "
                       "the environment's)")
    group.add_argument("--temperature", type=float, default=1.0, help="of the agent's sampling")
    group.add_argument("--max-new-tokens", type=int, help="at most, per message")
    group.add_argument("--batch-tokens", type=int, help="tokens held at once while sampling; lower "
                       "it when memory runs out")
    group.add_argument("--max-turns", type=int, default=10,
                       help="agent messages per episode, the answer included")
    group.add_argument("--human", help="scripted, self (the base model's weights), a server's "
                       "address http://HOST:PORT/v1#NAME (without #NAME the first model it lists), "
                       "or another name that the environment defines")
    group.add_argument("--parallel", type=int, help="dialogues played side by side")


def check_playing_flags(args, more: str = "") -> None:
    """UserError for values that cannot work. more: names of other flags that are at least 1."""
    at_least_one(args, f"k n_tasks max_turns parallel max_new_tokens batch_tokens {more}")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature}: must be 0 or more")


def load_tasks(args, environment: type[Environment]) -> list[dict]:
    """The tasks of --tasks, --n-tasks and --shard, without repeats. UserError for missing data."""
    tasks = {}
    for number, task in enumerate(environment.tasks(args.tasks, args.n_tasks), 1):
        for field in ("id", "problem_description", "ground_truth"):
            if not isinstance(task.get(field), str):
                raise UserError(f"--env {args.env}: task {number}: {field}: expected a string")
        tasks[task["id"]] = task
    return list(tasks.values())[args.shard[0] - 1::args.shard[1]]


def refuse_unused(given: set[str], because: str, names: str) -> None:
    """UserError if one of the flags `names` is given although another one makes it useless."""
    for name in names.split():
        if name in given:
            raise UserError(f"--{name.replace('_', '-')} has no effect with {because}: leave one "
                            "of them out")


def at_least_one(args, names: str) -> None:
    """UserError if one of the flags `names` is below 1."""
    for name in names.split():
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(args, name)}: must be at least 1")


def played_with(args, environment: type[Environment]) -> dict:
    """The flags of collect.py behind the trajectories of a training script.

    Read from the file next to them; for trajectories made elsewhere, the preset's."""
    defaults = dict(human="self", max_new_tokens=1024, batch_tokens=32768)
    if args.preset == "tiny":
        defaults = dict(human="scripted", max_new_tokens=96, batch_tokens=65536)
    defaults |= environment.presets.get("collect", {}).get(args.preset, {})
    return defaults | read_json(settings_file(args.trajectories))
