"""An OpenAI-compatible server for an agent that knows the hidden code: it asks, then answers.

    python tests/reference_agent.py tasks.jsonl --port 8123                # always right
    python tests/reference_agent.py tasks.jsonl --port 8123 --right 0.5    # half broken, by seed
    python collect.py --run runs/reference --tasks tasks.jsonl --n-tasks 300 --k 1 \\
        --candidate-share 0 --human scripted --model http://127.0.0.1:8123/v1

It checks a pipeline, not a model. With --right 1 every task scores 100 % unless the task or the
scorer is at fault. With --right 0.5 two trajectories of a task differ often enough to train a
critic on any tasks. It serves /v1/models and /v1/chat/completions, reads only `messages`, `seed`
and `max_tokens` from a request, and keeps no state between requests.
"""
import argparse
import ast
import json
import random
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from colbench.env.backend.tasks import load_tasks
from colbench.env.dialogue import MARKER

NAME = "reference-agent"
QUESTIONS = (
    "Could you tell me more about what you need?",
    "Is there anything special about the inputs?",
    "What should happen in unusual cases?",
    "Which units do you have in mind?",
    "Is there a rule that I should know of?",
    "How exactly should the result be returned?",
    "Are there limits that matter?",
    "Can you give me an example?",
)


def broken(hidden_code: str) -> str:
    """The hidden code with every function returning None, which never counts as right."""
    tree = ast.parse(hidden_code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [ast.Return(ast.Constant(None))]
    return ast.unparse(tree)


class ReferenceAgent:
    """Plays its tasks. asks: questions before the answer; right: share of right answers."""

    def __init__(self, tasks: list[dict], asks: int = 1, right: float = 1.0):
        self.tasks = {task["problem_description"].strip(): task for task in tasks}
        self.asks = asks
        self.right = right

    def task_of(self, messages: list[dict]) -> dict | None:
        """The task whose request ends the first user message, perhaps after a system prompt."""
        first = next((m["content"] for m in messages if m["role"] == "user"), "").strip()
        if first in self.tasks:
            return self.tasks[first]
        inside = [text for text in self.tasks if first.endswith(text)]
        return self.tasks[max(inside, key=len)] if inside else None

    def message(self, messages: list[dict], seed: int) -> str | None:
        """The agent's next message; None if the task is unknown."""
        task = self.task_of(messages)
        if task is None:
            return None
        rng = random.Random(seed)
        if sum(m["role"] == "assistant" for m in messages) < self.asks:
            return rng.choice(QUESTIONS)
        code = task["ground_truth"]
        if rng.random() >= self.right:
            code = broken(code)
        return f"{MARKER}\n```python\n{code}\n```"


def make_server(agent: ReferenceAgent, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 (port 0: any free one, see .server_port); .serve_forever() runs it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.reply(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = agent.message(body["messages"], body.get("seed") or 0)
            if text is None and body.get("max_tokens") == 1:  # a check that the server is up
                text = "Hello"
            if text is None:
                self.reply(400, {"error": {"message": "no task has this request",
                                           "type": "invalid_request_error"}})
            else:
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.reply(200, {"id": "0", "object": "chat.completion", "created": 0,
                                 "model": NAME, "choices": [choice]})

        def reply(self, status, payload):
            data = json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    return Server(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", help="a .jsonl file of tasks, or mini:train")
    parser.add_argument("--port", type=int, default=8123, help="(default: %(default)s)")
    parser.add_argument("--asks", type=int, default=1,
                        help="questions before the answer (default: %(default)s)")
    parser.add_argument("--right", type=float, default=1.0,
                        help="probability of the right answer (default: %(default)s)")
    args = parser.parse_args()
    tasks = load_tasks(args.tasks)
    server = make_server(ReferenceAgent(tasks, args.asks, args.right), args.port)
    print(f"{len(tasks)} tasks; --model http://127.0.0.1:{server.server_port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
