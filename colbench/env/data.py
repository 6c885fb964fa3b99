"""Tasks and trajectories in the published format, from a file or the hub; fields of all files."""
import hashlib
from itertools import islice
from pathlib import Path

from colbench.run.errors import UserError
from colbench.run.fields import COUNT, FROM_1, checked
from colbench.run.files import numbered_rows
from colbench.run.hub import download

HUB_FILES = {"test": "backend_tasks/test.jsonl", "train": "backend_tasks/train.jsonl",
             "offline": "colbench_code_offline_15k_llama8b.jsonl"}  # 15,000 trajectories, 8B agent
# outcome of a dialogue ended by an error of agent or human; the field "error" has the error
FAILED = "simulation_failed"


def _dialogue(value, where):
    kind = {"role": {"user", "assistant"}, "content?": str, "output?": str, "candidates?": [str],
            "tokens?": COUNT, "read?": COUNT, "written?": COUNT, "cut?": bool, "leaked?": bool}
    messages = [{**message, "content": message.get("content", "")}
                for message in checked(value, [kind], where)]
    if not messages:
        raise UserError(f"{where}: expected a list of messages, got an empty list")
    if messages[0]["role"] != "user":
        raise UserError(f"{where}[0]: role: the user's request comes first")
    return messages


TRAJECTORY = {"task": dict, "dialogue_history": _dialogue, "answer?": str, "reward?": float,
              "sample?": COUNT, "system?": str, "max_turns?": FROM_1, "outcome?": str,
              "error?": str, "scores?": dict}
TASK = {"problem_description": str, "ground_truth": str, "id?": str}
STATE = {"id": str, "sample": COUNT, "turn": FROM_1, "max_turns?": FROM_1, "candidates": [str],
         "advantages": [float],
         "messages": [{"role": {"system", "user", "assistant"}, "content": str}]}
CREDIT = {  # a line of advantages.jsonl
    "policy": str, "id": str, "sample": COUNT, "weights?": str, "dialogue?": range(1 << 63),
    "turns": [{"advantage": float, "ratios": [(COUNT, float)], "candidates?": [(str, float)]}]}


def read_tasks(source, check_task, limit=None):
    """The first `limit` (None: all) tasks of a file or hub data set, as check_task gives them.

    source: a .jsonl path, or on the Hugging Face hub `owner/dataset:test`, `:train`,
    `:path/in/the/dataset.jsonl` or `hf://datasets/owner/dataset/path.jsonl`. UserError with file,
    line and field if a line up to the limit is not a task, or if two different tasks have one id.
    """
    path = local_path(source)
    tasks, lines = [], {}
    for number, row in islice(numbered_rows(path), limit):
        task = check_task(row, f"{path}:{number}")
        texts = task["problem_description"], task["ground_truth"]
        first_line, first_texts = lines.setdefault(task["id"], (number, texts))
        if first_texts != texts:  # one of the two would be dropped silently
            raise UserError(f"{path}:{number}: id: {task['id']!r} is also the id of a different "
                            f"task in line {first_line}; give each task its own id")
        tasks.append(task)
    if not tasks:
        raise UserError(f"{path}: no tasks in this file")
    return tasks


def check_texts(row, where):
    """{"id", "problem_description", "ground_truth"} of a task in a file; other fields are dropped.

    `id` is the file's if it is a string, else a hash (12 hex digits) of the other two fields.
    `hidden_information` in published files repeats `ground_truth`.
    """
    fields = ("problem_description", "ground_truth")
    texts = checked({field: row.get(field) for field in fields}, TASK, where)
    for field, text in texts.items():
        if not text.strip():
            raise UserError(f"{where}: {field}: empty")
    name = row.get("id")
    if not isinstance(name, str) or not name:
        joined = "\n".join(texts.values()).encode("utf-8", "surrogatepass")
        name = hashlib.sha256(joined).hexdigest()[:12]
    return {"id": name, **texts}


def load_trajectories(source, check_task=check_texts, limit=None, scored=False):
    """The first `limit` trajectories of `source`, with every key of their lines.

    {"task", "dialogue_history": [{"role": "user" | "assistant", "content": str, …}, …],
     "answer": str, "id", "sample", …}

    source: a path or a hub file, as for read_tasks; `owner/dataset` alone means its `:offline`.
    task: checked by check_task, the environment's; other keys stay. id: the task's.
    sample: numbers the trajectories of a task, in file order if missing. A number already taken
        (two files put together) becomes the next free one, so (id, sample) is unique.
    answer: if missing, the last assistant message, after the answer marker if it has one.
    A missing or null reward stays missing. Null content is "".
    A line with outcome "simulation_failed" (older: "error: ...") is a failed dialogue. It is kept,
    and may lack assistant messages and an answer (then ""); callers leave such lines out.
    scored: UserError for any other line without a reward.
    """
    path = local_path(source, "offline")
    rows = numbered_rows(path, trajectory_line(check_task, scored))
    trajectories = number_samples(row for _, row in islice(rows, limit))
    if not trajectories:
        raise UserError(f"{path}: no trajectories in this file")
    return trajectories


def trajectory_line(check_task=check_texts, scored=False):
    """The kind (colbench/run/fields.py) of a line of any trajectories file.

    As load_trajectories gives it, except `sample`.
    """
    def kind(row, where):
        row = checked(row, TRAJECTORY, where)
        task = check_task(row["task"], f"{where}: task")
        if isinstance(row.get("id"), str):
            task["id"] = row["id"]
        said = [message["content"] for message in row["dialogue_history"]
                if message["role"] == "assistant"]
        if not said and not failed(row):
            raise UserError(f"{where}: dialogue_history: no assistant message")
        if scored and "reward" not in row and not failed(row):
            raise UserError(f"{where}: reward: missing; score it with collect.py --run OTHER "
                            f"--add-candidates-to {where.rpartition(':')[0]}")
        last_answer = said[-1].split("I WANT TO ANSWER:")[:2][-1] if said else ""
        answer = row.get("answer", last_answer)
        return {**row, "task": row["task"] | task, "answer": answer, "id": task["id"]}
    return kind


def number_samples(trajectories) -> list[dict]:
    """The trajectories, each with a `sample` that is unique within its task."""
    numbered = {}
    for row in trajectories:
        sample = row.get("sample", 0)
        while (row["id"], sample) in numbered:
            sample += 1
        numbered[row["id"], sample] = row | {"sample": sample}
    return list(numbered.values())


def episode_line(environment, policy: bool = False):
    """The kind of a line written by collect.py, or by evaluate.py (policy=True)."""
    names = {"id": str, "sample": COUNT, "outcome": str} | ({"policy": str} if policy else {})
    scored = {"reward": float} | ({"scores": environment.scores} if environment.scores else {})

    def kind(row, where):
        row = checked(row, TRAJECTORY | {"task": TASK} | names, where)
        return row if failed(row) else checked(row, scored, where)
    return kind


def state_line(row: dict, where: str) -> dict:
    """The kind of a line of preferences.jsonl: a dialogue so far, and ranked next messages."""
    row = checked(row, STATE, where)
    roles = [message["role"] for message in row["messages"]]
    roles = roles[roles[:1] == ["system"]:]
    if not roles or roles[0] != "user" or roles[-1] != "user" or "system" in roles:
        raise UserError(f"{where}: messages: expected a dialogue that starts (after the system "
                        "prompt) and ends with a user message")
    if len(row["candidates"]) != len(row["advantages"]):
        raise UserError(f"{where}: advantages: expected {len(row['candidates'])}, as many as "
                        f"candidates, got {len(row['advantages'])}")
    return row


def of_first_tasks(trajectories, n):
    """The first n trajectories task by task, so that a few still form pairs; 0: all, in file order.

    (A file has them sample by sample.)
    """
    if not n:
        return trajectories
    order = {}
    for trajectory in trajectories:
        order.setdefault(trajectory["id"], len(order))
    return sorted(trajectories, key=lambda trajectory: order[trajectory["id"]])[:n]


def failed(line):
    """Whether an error of agent or human ended the dialogue: no reward, counted in no rate."""
    outcome = str(line.get("outcome"))
    return outcome == FAILED or outcome.startswith("error")  # "error: ..." in older files


def local_path(source, split="test"):
    """The local path of a file, `owner/dataset:file` or `hf://datasets/owner/dataset/file`.

    split: what `owner/dataset` alone means. UserError if there is no such file.
    """
    source = str(source)
    if Path(source).exists():
        return source
    if source.startswith("hf://"):
        parts = source.removeprefix("hf://").removeprefix("datasets/").split("/", 2)
        if len(parts) < 3:
            raise UserError(f"{source}: expected hf://datasets/owner/dataset/path/to/file.jsonl")
        return download("/".join(parts[:2]), parts[2], source)
    dataset, _, file = source.partition(":")
    is_hub_id = (dataset.count("/") == 1 and not dataset.startswith((".", "/", "~"))
                 and not dataset.endswith(".jsonl"))
    if not is_hub_id:
        raise UserError(f"{source}: no such file")
    return download(dataset, HUB_FILES.get(file or split, file), source)
