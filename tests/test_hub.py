"""Tasks, trajectories and models by their names on the hub: its client against a local server."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from colbench.env.backend.mini import mini_tasks

ROOT = Path(__file__).resolve().parents[1]
OFFLINE_FILE = "colbench_code_offline_15k_llama8b.jsonl"
LOAD_TASKS = "colbench.env.backend.tasks.load_tasks"


def trajectory(task):
    history = [{"role": "user", "content": task["problem_description"]},
               {"role": "assistant", "content": "What is the toll?"},
               {"role": "user", "content": "I don't know."},
               {"role": "assistant", "content": "I WANT TO ANSWER:\ndef f():\n    return 1"}]
    return {"task": {k: v for k, v in task.items() if k != "id"}, "dialogue_history": history,
            "answer": "def f():\n    return 1"}


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Hub(http.server.BaseHTTPRequestHandler):
    """A small hub. owner/data is public; the other names say what is wrong with them."""

    files = {"backend_tasks/test.jsonl": jsonl(mini_tasks("test", 2)),
             "backend_tasks/train.jsonl": jsonl(mini_tasks("train", 3)),
             OFFLINE_FILE: jsonl(map(trajectory, mini_tasks("train", 2))),
             "other/file.jsonl": jsonl(mini_tasks("test", 1))}
    asked = []

    def answer(self):
        self.asked.append(self.path)
        path = self.path.split("?")[0].removeprefix("/datasets")
        repository, _, file = path.strip("/").partition("/resolve/main/")
        body = self.files.get(file)
        status, code = 200, None
        if repository == "old/data":  # renamed
            self.send_response(307)
            self.send_header("Location", self.path.replace("old/data", "owner/data"))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if "gated" in repository:
            status, code = 403, "GatedRepo"
        elif "private" in repository:  # looks like a missing one without a login
            status = 401
        elif "missing" in repository:
            status, code = 404, "RepoNotFound"
        elif "forbidden" in repository:
            status = 403
        elif "broken" in repository:
            status = 500
        elif body is None:
            status, code = 404, "EntryNotFound"
        body = body if status == 200 else b""
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def environment(hub, home, offline=False):
    names = {name: value for name, value in os.environ.items()
             if not name.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
    return names | {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)),
                    "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}


def each(function, sources, env):
    """Call `function` (module.name) on each source: the length of its result, or its UserError."""
    code = """if True:
        import importlib, json, sys
        from colbench.run.errors import UserError
        module, name = sys.argv[1].rsplit(".", 1)
        for source in sys.argv[2:]:
            try:
                print(json.dumps(len(getattr(importlib.import_module(module), name)(source))))
            except UserError as error:
                print(json.dumps(str(error)))"""
    done = subprocess.run([sys.executable, "-c", code, function, *sources], env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in '"0123456789']


def test_tasks_by_name(hub, tmp_path):
    sources = {"owner/data": 2, "owner/data:test": 2, "owner/data:train": 3,
               "owner/data:other/file.jsonl": 1, "old/data:train": 3,
               "hf://datasets/owner/data/backend_tasks/train.jsonl": 3}
    assert each(LOAD_TASKS, sources, environment(hub, tmp_path)) == list(sources.values())
    assert any(path.endswith("/datasets/owner/data/resolve/main/backend_tasks/test.jsonl")
               for path in Hub.asked)


def test_trajectories_by_name(hub, tmp_path):
    sources = ["owner/data", "owner/data:offline", f"owner/data:{OFFLINE_FILE}",
               f"hf://datasets/owner/data/{OFFLINE_FILE}"]
    lengths = each("colbench.env.data.load_trajectories", sources, environment(hub, tmp_path))
    assert lengths == [2] * 4


def test_what_the_hub_refuses_is_reported_in_one_line(hub, tmp_path):
    env = environment(hub, tmp_path)
    cases = {
        "gated/data:test":
            f"gated/data is gated: accept its terms at {hub}/datasets/gated/data, then `hf auth",
        "private/data:test": "the hub has no data set private/data, or a private one",
        "missing/data": "the hub has no data set missing/data, or a private one",
        "forbidden/data":
            "the hub refuses forbidden/data (403): `hf auth login` with a token that may read it",
        "owner/data:none.jsonl":
            f"owner/data has no such file; {hub}/datasets/owner/data/tree/main lists them",
        "broken/data": "the hub answers 500 for broken/data"}
    for (source, words), got in zip(cases.items(), each(LOAD_TASKS, cases, env), strict=True):
        assert got.startswith(f"{source}: no such local file, and {words}") and "\n" not in got
        assert got.endswith("; or pass the path of a downloaded file")


def test_without_the_hub(hub, tmp_path):
    """Without the hub, fetched files still load; the others are reported in one line."""
    assert each(LOAD_TASKS, ["owner/data:test"], environment(hub, tmp_path)) == [2]
    sources = ["owner/data:test", "owner/data:train"]
    length, line = each(LOAD_TASKS, sources, environment("http://127.0.0.1:9", tmp_path))
    assert length == 2
    assert "http://127.0.0.1:9 does not answer, and owner/data was not fetched before" in line
    length, line = each(LOAD_TASKS, sources, environment(hub, tmp_path, offline=True))
    assert length == 2 and "HF_HUB_OFFLINE forbids" in line


@pytest.mark.parametrize("function", ["load_tokenizer", "load_model"])
def test_models_that_the_hub_refuses(hub, tmp_path, function):
    env = environment(hub, tmp_path)
    cases = {
        "gated/model":
            f"gated/model is gated: accept its terms at {hub}/gated/model, then `hf auth",
        "private/model": "the hub has no model private/model, or a private one",
        "missing/model": "the hub has no model missing/model, or a private one"}
    results = each(f"colbench.lm.load.{function}", cases, env)
    for (name, words), got in zip(cases.items(), results, strict=True):
        assert got.startswith(f"model {name}: {words}") and "\n" not in got
    [line] = each(f"colbench.lm.load.{function}", ["owner/model"],
                  environment("http://127.0.0.1:9", tmp_path, offline=True))
    assert line.startswith("model owner/model: ") and "not fetched before" in line
    assert "\n" not in line


def collect(hub, home, *flags):
    return subprocess.run([sys.executable, str(ROOT / "collect.py"), *flags],
                          env=environment(hub, home), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_collect_straight_from_the_hub(hub, tmp_path):
    """The README's commands: tasks by name, and the published trajectories by name."""
    for flags, count in ((["--tasks", "owner/data:train", "--k", "1"], 3),
                         (["--add-candidates-to", "owner/data:offline"], 2)):
        run = tmp_path / str(count)
        done = collect(hub, tmp_path, "--run", str(run), "--candidate-share", "1", *flags)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(line) for line in (run / "trajectories.jsonl").read_text().splitlines()]
        assert len(rows) == count and all("reward" in row for row in rows)
        assert all(len(row["dialogue_history"][1]["candidates"]) == 16 for row in rows)
    done = collect(hub, tmp_path, "--run", str(tmp_path / "no"), "--tasks", "gated/data:train")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert any(line.startswith("error: ") and "is gated" in line
               for line in done.stderr.splitlines())
