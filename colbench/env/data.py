"""Tasks and trajectories in the published format, from a file or the hub; what a line of each file is to hold."""
import hashlib
from itertools import islice
from pathlib import Path

from colbench.run.errors import UserError
from colbench.run.fields import COUNT, FROM_1, checked
from colbench.run.files import numbered_rows
from colbench.run.hub import download

HUB_FILES = {"test": "backend_tasks/test.jsonl", "train": "backend_tasks/train.jsonl",
             "offline": "colbench_code_offline_15k_llama8b.jsonl"}  # 15,000 trajectories of an 8B agent
FAILED = "simulation_failed"  # the outcome of a dialogue that an error of agent or human ended; "error" says which


def _dialogue(value, where):
    message = {"role": {"user", "assistant"}, "content?": str, "output?": str, "candidates?": [str], "tokens?": COUNT,
               "read?": COUNT, "written?": COUNT, "cut?": bool, "leaked?": bool}
    messages = [{**found, "content": found.get("content", "")} for found in checked(value, [message], where)]
    if not messages:
        raise UserError(f"{where}: a list of messages is wanted, this is empty")
    if messages[0]["role"] != "user":
        raise UserError(f"{where}[0]: role: the user's request comes first")
    return messages


TRAJECTORY = {"task": dict, "dialogue_history": _dialogue, "answer?": str, "reward?": float, "sample?": COUNT,
              "system?": str, "max_turns?": FROM_1, "outcome?": str, "error?": str, "scores?": dict}
TASK = {"problem_description": str, "ground_truth": str, "id?": str}
STATE = {"id": str, "sample": COUNT, "turn": FROM_1, "max_turns?": FROM_1, "candidates": [str],
         "advantages": [float],
         "messages": [{"role": {"system", "user", "assistant"}, "content": str}]}
CREDIT = {"policy": str, "id": str, "sample": COUNT, "weights?": str, "dialogue?": range(1 << 63), "turns": [
    {"advantage": float, "ratios": [(COUNT, float)], "candidates?": [(str, float)]}]}  # a line of advantages.jsonl


def read_tasks(source, check_task, limit=None):
    """The first `limit` (None: all) tasks of a file or of a hub data set, each as check_task(row, where) gives it.

    source: a .jsonl path; on the Hugging Face hub `owner/dataset:test`, `:train` or `:path/in/the/dataset.jsonl`, or
    `hf://datasets/owner/dataset/path.jsonl`. UserError, naming file, line and field, for anything that cannot be a
    task, and for one id with two meanings; all lines up to the limit are checked.
    """
    path = local_path(source)
    tasks, lines = [], {}
    for number, row in islice(numbered_rows(path), limit):
        task = check_task(row, f"{path}:{number}")
        texts = task["problem_description"], task["ground_truth"]
        line, same = lines.setdefault(task["id"], (number, texts))
        if same != texts:  # one of them would be left out without a word
            raise UserError(f"{path}:{number}: id: {task['id']!r} is that of another task, in line {line}")
        tasks.append(task)
    if not tasks:
        raise UserError(f"{path}: no tasks in it")
    return tasks


def check_texts(row, where):
    """{"id", "problem_description", "ground_truth"} of a task in a file; its other fields are dropped.

    `id` is the file's own if it is a text, else twelve hex digits of the two others: equal tasks have equal ids.
    (`hidden_information`, in published files, repeats the reference.)
    """
    texts = checked({field: row.get(field) for field in ("problem_description", "ground_truth")}, TASK, where)
    for field, text in texts.items():
        if not text.strip():
            raise UserError(f"{where}: {field}: empty")
    name = row.get("id")
    if not isinstance(name, str) or not name:
        name = hashlib.sha256("\n".join(texts.values()).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return {"id": name, **texts}


def load_trajectories(source, check_task=check_texts, limit=None, scored=False):
    """The first `limit` trajectories of `source`, each with all the keys it has. `source` is a path or a hub file as
    for read_tasks; `owner/dataset` alone means its `:offline`, the published 15,000.

    {"task", "dialogue_history": [{"role": "user" | "assistant", "content": str, …}, …], "answer": str, "id", "sample"}
    `task` is checked by check_task, the environment's; its other keys stay. `id` is the task's. `sample` counts the
    trajectories of a task in file order where the file has none; a number that is taken already (two files put
    together) becomes the next free one, so (id, sample) is unique. A missing `answer` is the last assistant message,
    after the answer marker if it has one. A missing `reward` stays missing, null is missing. Content null counts as "".
    A line whose "outcome" is "simulation_failed" (once "error: ...") is a dialogue that broke off: it is kept, and may
    lack an assistant message and an answer (then ""); callers leave such lines out. scored: UserError for another one
    without a reward.
    """
    path = local_path(source, "offline")
    rows = numbered_rows(path, trajectory_line(check_task, scored))
    trajectories = number_samples(row for _, row in islice(rows, limit))
    if not trajectories:
        raise UserError(f"{path}: no trajectories in it")
    return trajectories


def trajectory_line(check_task=check_texts, scored=False):
    """The kind (colbench/run/fields.py) of a line of trajectories.jsonl, wherever it was made: what load_trajectories
    gives, but for the samples."""
    def kind(row, where):
        row = checked(row, TRAJECTORY, where)
        task = check_task(row["task"], f"{where}: task")
        if isinstance(row.get("id"), str):
            task["id"] = row["id"]
        said = [message["content"] for message in row["dialogue_history"] if message["role"] == "assistant"]
        if not said and not failed(row):
            raise UserError(f"{where}: dialogue_history: no assistant message")
        if scored and "reward" not in row and not failed(row):
            raise UserError(f"{where}: reward: missing; score it with collect.py --run OTHER --add-candidates-to "
                            + where.rpartition(":")[0])
        answer = row.get("answer", said[-1].split("I WANT TO ANSWER:")[:2][-1] if said else "")
        return {**row, "task": row["task"] | task, "answer": answer, "id": task["id"]}
    return kind


def number_samples(trajectories) -> list[dict]:
    """The trajectories, each with a `sample` that no other one of its task has."""
    found = {}
    for row in trajectories:
        sample = row.get("sample", 0)
        while (row["id"], sample) in found:
            sample += 1
        found[row["id"], sample] = row | {"sample": sample}
    return list(found.values())


def episode_line(environment, policy: bool = False):
    """The kind of a line that collect.py wrote, or evaluate.py (policy: it says which one played)."""
    names = {"id": str, "sample": COUNT, "outcome": str} | ({"policy": str} if policy else {})
    scored = {"reward": float} | ({"scores": environment.scores} if environment.scores else {})

    def kind(row, where):
        row = checked(row, TRAJECTORY | {"task": TASK} | names, where)
        return row if failed(row) else checked(row, scored, where)
    return kind


def state_line(row: dict, where: str) -> dict:
    """The kind of a line of preferences.jsonl: a dialogue up to the user's message, candidates for the next one."""
    row = checked(row, STATE, where)
    roles = [message["role"] for message in row["messages"]]
    roles = roles[roles[:1] == ["system"]:]
    if not roles or roles[0] != "user" or roles[-1] != "user" or "system" in roles:
        raise UserError(f"{where}: messages: a dialogue is wanted that begins (behind the system prompt) and ends with "
                        "the user's message")
    if len(row["candidates"]) != len(row["advantages"]):
        raise UserError(f"{where}: advantages: there are {len(row['advantages'])} for "
                        f"{len(row['candidates'])} candidates")
    return row


def of_first_tasks(trajectories, n):
    """The first n trajectories, task by task (a file has them sample by sample), so that few still hold pairs.

    0: all, in the file's order.
    """
    order = {}
    for trajectory in trajectories:
        order.setdefault(trajectory["id"], len(order))
    return sorted(trajectories, key=lambda trajectory: order[trajectory["id"]])[:n] if n else trajectories


def failed(line):
    """Whether a line's dialogue broke off for an error of agent or human: it has no reward and counts in no rate."""
    outcome = str(line.get("outcome"))
    return outcome == FAILED or outcome.startswith("error")  # the latter in older files


def local_path(source, split="test"):
    """Local path of a path, `owner/dataset:file` or `hf://datasets/owner/dataset/file`; UserError if there is none.

    split: what `owner/dataset` alone means.
    """
    source = str(source)
    if Path(source).exists():
        return source
    if source.startswith("hf://"):
        parts = source.removeprefix("hf://").removeprefix("datasets/").split("/", 2)
        if len(parts) < 3:
            raise UserError(f"{source}: hf://datasets/owner/dataset/path/to/file.jsonl is wanted")
        return download("/".join(parts[:2]), parts[2], source)
    dataset, _, file = source.partition(":")
    is_hub_id = dataset.count("/") == 1 and not dataset.startswith((".", "/", "~")) and not dataset.endswith(".jsonl")
    if not is_hub_id:
        raise UserError(f"{source}: no such file")
    return download(dataset, HUB_FILES.get(file or split, file), source)
