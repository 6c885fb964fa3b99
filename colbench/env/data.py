"""Tasks and trajectories in the published format, from a file or the hub."""
import hashlib
import math
from itertools import islice
from pathlib import Path

from colbench.run.errors import UserError
from colbench.run.files import numbered_rows
from colbench.run.hub import download

HUB_FILES = {"test": "backend_tasks/test.jsonl", "train": "backend_tasks/train.jsonl",
             "offline": "colbench_code_offline_15k_llama8b.jsonl"}  # 15,000 trajectories of an 8B agent
FAILED = "simulation_failed"  # the outcome of a dialogue that an error of agent or human ended; "error" says which


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
    texts = {}
    for field in ("problem_description", "ground_truth"):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            problem = "missing" if value is None else "empty" if isinstance(value, str) else "not a text"
            raise UserError(f"{where}: {field}: {problem}")
        texts[field] = value
    name = row.get("id")
    if not isinstance(name, str) or not name:
        name = hashlib.sha256("\n".join(texts.values()).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return {"id": name, **texts}


def load_trajectories(source, check_task=check_texts, limit=None):
    """The first `limit` trajectories of `source`, each with all the keys it has. `source` is a path or a hub file as
    for read_tasks; `owner/dataset` alone means its `:offline`, the published 15,000.

    {"task", "dialogue_history": [{"role": "user" | "assistant", "content": str, …}, …], "answer": str, "id", "sample"}
    `task` is checked by check_task, the environment's; its other keys stay. `id` is the task's. `sample` counts the
    trajectories of a task in file order where the file has none; a number that is taken already (two files put
    together) becomes the next free one, so (id, sample) is unique. A missing `answer` is the last assistant message,
    after the answer marker if it has one. A missing `reward` stays missing, null is missing. Content null counts as "".
    A line whose "outcome" is "simulation_failed" (once "error: ...") is a dialogue that broke off: it is kept, and may
    lack an assistant message and an answer (then ""); callers leave such lines out.
    """
    path = local_path(source, "offline")
    trajectories, seen = [], set()
    for number, row in islice(numbered_rows(path, ("task", "dialogue_history")), limit):
        where = f"{path}:{number}"
        if not isinstance(row["task"], dict):
            raise UserError(f"{where}: task: an object is wanted, this is a {type(row['task']).__name__}")
        task = check_task(row["task"], f"{where}: task")
        if isinstance(row.get("id"), str):
            task["id"] = row["id"]
        broke_off = failed(row)
        dialogue = _dialogue(row["dialogue_history"], where, broke_off)
        reward = row.pop("reward", None)
        if reward is not None:
            if type(reward) not in (int, float) or not math.isfinite(reward):
                raise UserError(f"{where}: reward: a number is wanted, this is {reward!r}")
            row["reward"] = reward
        answer = row.get("answer")
        if answer is None:
            said = [message["content"] for message in dialogue if message["role"] == "assistant"]
            answer = said[-1].split("I WANT TO ANSWER:")[:2][-1] if said else ""
        if not isinstance(answer, str):
            raise UserError(f"{where}: answer: a text is wanted, this is a {type(answer).__name__}")
        sample = row.get("sample")
        if sample is None:
            sample = 0
        if type(sample) is not int:
            raise UserError(f"{where}: sample: a whole number is wanted, this is {sample!r}")
        while (task["id"], sample) in seen:
            sample += 1
        seen.add((task["id"], sample))
        trajectories.append({**row, "task": {**row["task"], **task}, "dialogue_history": dialogue, "answer": answer,
                             "id": task["id"], "sample": sample})
    if not trajectories:
        raise UserError(f"{path}: no trajectories in it")
    return trajectories


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


def _dialogue(history, where, broke_off):
    if not isinstance(history, list) or not history:
        raise UserError(f"{where}: dialogue_history: a list of messages is wanted")
    messages = []
    for turn, message in enumerate(history):
        field = f"{where}: dialogue_history[{turn}]"
        if not isinstance(message, dict):
            raise UserError(f"{field}: an object is wanted, this is a {type(message).__name__}")
        if message.get("role") not in ("user", "assistant"):
            raise UserError(f"{field}: role: user or assistant is wanted, this is {message.get('role')!r}")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise UserError(f"{field}: content: a text is wanted, this is a {type(content).__name__}")
        messages.append({**message, "content": content or ""})
    if messages[0]["role"] != "user":
        raise UserError(f"{where}: dialogue_history[0]: role: the user's request comes first")
    if not broke_off and all(message["role"] == "user" for message in messages):
        raise UserError(f"{where}: dialogue_history: no assistant message")
    return messages
