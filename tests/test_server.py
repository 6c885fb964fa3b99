"""colbench/lm/server.py against local HTTP servers that answer, fail, hang, hang up and record."""
import base64
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from colbench.lm.server import Reply, ServerChat
from colbench.lm.texts import NoText, OnlyThoughts
from colbench.run.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
QUICK = {"retry-after-ms": "1"}  # asks the client for a short back-off


class Server:
    """An OpenAI-compatible server. behave(body, earlier) answers after `earlier` equal requests.

    It returns a text, or (status, headers, payload), or "hang up" or "hang".
    """

    def __init__(self, behave=lambda body, earlier: "hello", models=("first", "second")):
        self.requests, self.in_flight, self.most_in_flight = [], 0, 0
        lock, owner = threading.Lock(), self
        self.over = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if isinstance(models, int):
                    return self.send(models, {}, {"error": {"message": "no list here"}})
                self.send(200, {}, {"object": "list",
                                    "data": [{"id": name, "object": "model"} for name in models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    earlier = sum(body == request for request in owner.requests)
                    owner.requests.append(body)
                    owner.path, owner.key = self.path, self.headers["Authorization"]
                    owner.in_flight += 1
                    owner.most_in_flight = max(owner.most_in_flight, owner.in_flight)
                try:
                    result = behave(body, earlier)
                finally:
                    with lock:
                        owner.in_flight -= 1
                if result == "hang up":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif result == "hang":
                    owner.over.wait(30)
                    self.close_connection = True
                else:
                    self.send(*(result if isinstance(result, tuple)
                                else (200, {}, completion(result))))

            def send(self, status, headers, payload):
                data = (payload.encode() if isinstance(payload, str)
                        else json.dumps(payload).encode())
                self.send_response(status)
                kind = "text/html" if isinstance(payload, str) else "application/json"
                headers = {"Content-Type": kind, "Content-Length": str(len(data)), **headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        class Threads(http.server.ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, request, client_address):  # clients that gave up
                pass

        self.server = Threads(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def completion(text, tokens=3, reason="stop", **more):
    message = {"role": "assistant", "content": text, **more}
    usage = {"usage": {"prompt_tokens": 9, "completion_tokens": tokens,
                       "total_tokens": 9 + (tokens or 0)}}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "first",
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            **(usage if tokens else {})}


def heard(text, tokens=3, thoughts="", cut=False):
    """The Reply to a `completion`."""
    return Reply(text, tokens, thoughts, tokens and (9, tokens), cut)


@pytest.fixture
def serve():
    servers = []

    def start(*arguments, **settings):
        servers.append(Server(*arguments, **settings))
        return servers[-1]
    yield start
    for server in servers:
        server.close()


def says(text):
    return [{"role": "user", "content": text}]


def last(body):
    return body["messages"][-1]["content"]


def test_half_a_surrogate_pair_reaches_the_server_as_a_question_mark(serve):
    server = serve(lambda body, earlier: "\udc00!")
    chat = ServerChat(server.url, "first")
    parts = [{"type": "text", "text": "b\ud83d"},
             {"type": "image_url", "image_url": {"url": "data:,"}}]
    [[reply]] = chat.sample([[*says("a\ud83d"), {"role": "user", "content": parts}]], [[1]])
    assert reply.text == "\udc00!"  # the reply is kept as it came
    assert ([m["content"] for m in server.requests[0]["messages"]] ==
            ["a?", [{"type": "text", "text": "b?"}, parts[1]]])


def test_one_request_per_seed_and_every_reply_in_its_place(serve):
    def behave(body, earlier):
        time.sleep(random.random() / 20)  # replies arrive in any order
        return 200, {}, completion(f"{last(body)}/{body['seed']}", tokens=1 + body["seed"] % 5)
    server = serve(behave)
    chat = ServerChat(server.url, "second", concurrency=16)
    seeds = [[b * 100 + s + 2**62 for s in range(b % 4)] for b in range(12)]
    conversations = [[{"role": "system", "content": "short", "extra": 1}, *says(f"task {b}")]
                     for b in range(12)]
    replies = chat.sample(conversations, seeds, temperature=0, max_new_tokens=77, stop=["END"])
    assert replies == [[heard(f"task {b}/{s}", 1 + s % 5) for s in row]
                       for b, row in enumerate(seeds)]
    assert (sorted(body["seed"] for body in server.requests) ==
            sorted(s for row in seeds for s in row))
    for body in server.requests:
        assert body["model"] == "second" and body["temperature"] == 0 and body["max_tokens"] == 77
        assert body["stop"] == ["END"]
        assert body["messages"][0] == {"role": "system", "content": "short"}
        assert body.get("n", 1) == 1
    assert server.path == "/v1/chat/completions"
    assert chat.sample([], []) == [] and chat.sample([says("x")], [[]]) == [[]]


def test_requests_run_in_parallel_up_to_the_limit(serve):
    server = serve(lambda body, earlier: time.sleep(0.2) or "slow")
    start = time.monotonic()
    ServerChat(server.url, "first", concurrency=8).sample([says("x")] * 4, [[1, 2, 3, 4]] * 4)
    assert server.most_in_flight == 8 and time.monotonic() - start >= 0.4


def test_temporary_errors_are_retried(serve):
    def behave(body, earlier):
        trouble = {"busy": (429, QUICK, {"error": {"message": "slow down"}}),
                   "broken": (500, QUICK, {"error": {}}),
                   "starting": (503, QUICK, "not yet"), "lost": "hang up"}
        return "at last" if earlier >= 2 else trouble[last(body)]
    server = serve(behave)
    kinds = ["busy", "broken", "starting", "lost"]
    chat = ServerChat(server.url, "first", max_retries=2)
    replies = chat.sample([says(kind) for kind in kinds], [[5]] * 4)
    assert [row[0].text for row in replies] == ["at last"] * 4
    assert all(sum(last(body) == kind for body in server.requests) == 3 for kind in kinds)


def test_a_failed_request_does_not_affect_others(serve):
    def behave(body, earlier):
        results = {"dead": "hang up", "stuck": "hang",
                   "down": (500, QUICK, {"error": {"message": "out of memory"}}),
                   "page": (200, {}, "<html>a proxy</html>"), "odd": (200, {}, {"choices": []}),
                   "strange": (200, {"Content-Type": "application/json"}, "{not json")}
        return results.get(last(body), "fine")
    server = serve(behave)
    kinds = ["dead", "good", "stuck", "good", "down", "page", "odd", "good", "strange", "good"]
    replies = ServerChat(server.url, "first", timeout=0.5, max_retries=1).sample(
        [says(kind) for kind in kinds], [[1, 2]] * len(kinds))
    for kind, row in zip(kinds, replies):
        for reply in row:
            if kind == "good":
                assert reply == heard("fine")
            else:
                assert isinstance(reply, Exception) and "\n" not in str(reply)
                assert server.url in str(reply)
    words = {kind: str(row[0]) for kind, row in zip(kinds, replies)}
    assert "out of memory" in words["down"] and "timed out" in words["stuck"]
    assert "not a chat completion" in words["page"]


def test_a_server_that_drips_bytes_is_given_up(serve):
    """A byte now and then keeps the connection from timing out."""
    over = threading.Event()

    def drip(connection):
        connection.recv(10_000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 1000\r\n\r\n")
        while not over.wait(0.05):
            connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: drip(listener.accept()[0]), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        chat = ServerChat(url, "first", timeout=0.5, max_retries=0)
        chat._patience = 1.0
        (reply,), = chat.sample([says("x")], [[1]])
        over.set()
    assert isinstance(reply, Exception) and "no complete reply in 1 s" in str(reply)


def test_a_too_long_dialogue_is_sent_once(serve):
    message = ("This model's maximum context length is 8192 tokens. "
               "Please reduce the length of the messages.")
    server = serve(lambda body, earlier: (400, {}, {"error": {"message": message, "code": 400}}))
    (reply,), = ServerChat(server.url, "first").sample([says("long")], [[1]])
    assert isinstance(reply, Exception) and message in str(reply) and len(server.requests) == 1


@pytest.mark.parametrize("empty", [None, ""])
def test_a_reply_without_text_is_retried_once(serve, empty):
    seen = {}

    def behave(body, earlier):
        nth = seen[last(body)] = seen.get(last(body), 0) + 1
        if last(body) == "mute" or nth == 1:
            return 200, {}, completion(empty, reason="length")
        return "found words"
    server = serve(behave)
    chat = ServerChat(server.url, "first")
    (first,), = chat.sample([says("shy")], [[7]])
    assert first.text == "found words" and len({body["seed"] for body in server.requests}) == 2
    (second,), = chat.sample([says("mute")], [[7]])
    assert isinstance(second, Exception) and "without text" in str(second)
    assert "length" in str(second)
    assert len(server.requests) == 4


def test_a_server_that_does_not_count_tokens(serve):
    server = serve(lambda body, earlier: (200, {}, completion("hi", tokens=None)))
    assert ServerChat(server.url, "first").sample([says("x")], [[1]]) == [[heard("hi", None)]]


def part(kind, text, key="text"):
    return {"type": kind, key: text}


@pytest.mark.parametrize("message, reply", [
    ({"content": [part("text", "hello")]}, ("hello", "")),
    ({"content": ["hel", part("text", "lo")]}, ("hello", "")),
    ({"content": [part("thinking", [part("text", "hm")], "thinking"), part("text", "hello")]},
     ("hello", "hm")),
    ({"content": [part("reasoning", "hm"), part("output_text", "hello")]}, ("hello", "hm")),
    ({"content": [part("thinking", "hm", "thinking") | {"text": ""}, part("text", "hello")]},
     ("hello", "hm")),
    ({"content": [{"text": "hm", "thought": True}, {"text": "hello"}]}, ("hello", "hm")),
    ({"content": [part("reasoning", [part("summary_text", "hm")], "summary"),
                  part("text", "hello")]}, ("hello", "hm")),
    ({"content": {"text": "hello"}}, ("hello", "")),
    ({"content": {"parts": [{"text": "hello"}]}}, ("hello", "")),
    ({"content": 7}, ("7", "")),
    ({"content": [None, part("text", {"value": "hello"}), {}]}, ("hello", "")),
    ({"content": "hello", "reasoning_content": "hm"}, ("hello", "hm")),
    ({"content": "hello", "reasoning": "hm", "reasoning_content": None}, ("hello", "hm")),
    ({"content": "hello", "reasoning_details": [part("reasoning.text", "hm")]}, ("hello", "hm")),
    ({"content": "<think>so</think>hello", "reasoning_content": "hm"}, ("hello", "hm\n\nso")),
    ({"content": "hello<|im_end|>", "refusal": None, "tool_calls": None}, ("hello", "")),
    ({"content": [part("text", "a</think>hello")]}, ("hello", "a")),
])
def test_content_of_every_shape_and_thoughts_in_it_or_next_to_it(serve, message, reply):
    server = serve(lambda body, earlier: (200, {}, completion(**({"text": message["content"]} | {
        name: value for name, value in message.items() if name != "content"}))))
    assert (ServerChat(server.url, "first").sample([says("x")], [[1]]) ==
            [[heard(reply[0], 3, reply[1])]])


@pytest.mark.parametrize("message, words", [
    (completion(None, reasoning_content="hm"), "only thoughts"),
    (completion("<think>hm"), "only thoughts"),
    (completion([part("thinking", "hm", "thinking")]), "only thoughts"),
    (completion([]), "without text"),
    (completion({}), "without text"),
    (completion([{"type": "image_url", "image_url": {"url": "x"}}]), "without text"),
    (completion(None, refusal="I can't help."), "the model refuses: I can't help."),
    (completion([{"type": "refusal", "refusal": "I can't."}]), "the model refuses: I can't."),
    (completion([part("thinking", "hm", "thinking"), part("refusal", "No.", "refusal")]),
     "the model refuses: No."),
    (completion(None, reason="tool_calls", tool_calls=[{"id": "1"}]),
     "only a tool call (finish reason: tool_calls)"),
    (completion("hal", reason="content_filter"), "broke off (finish reason: content_filter)"),
    (completion("hal", reason="error"), "finish reason: error"),
    (completion("hal", reason="abort"), "reason: abort"),
    (completion(None, reason=None), "without text (finish reason: None)"),
    (completion("<|im_end|>"), "without text"),
])
def test_a_second_reply_without_text_is_an_error(serve, message, words):
    def behave(body, earlier):
        return "hello" if last(body) != "x" and server.requests[1:] else (200, {}, message)
    server = serve(behave)
    [[reply]] = ServerChat(server.url, "first").sample([says("x")], [[1]])
    assert isinstance(reply, NoText) and isinstance(reply, OnlyThoughts) == ("thoughts" in words)
    assert words in str(reply) and "twice" in str(reply) and len(server.requests) == 2
    server.requests.clear()
    [[reply]] = ServerChat(server.url, "first").sample([says("y")], [[1]])
    assert reply.text == "hello" and len({body["seed"] for body in server.requests}) == 2


@pytest.mark.parametrize("body, status, attempts", [
    ({"error": {"message": "so it is", "code": 429}}, 429, 3),
    ({"error": {"message": "so it is", "code": "502"}}, 502, 3),
    ({"error": {"message": "so it is", "code": 400}, "choices": None}, 400, 1),
    ({"error": {"message": "so it is", "code": 401}, "choices": []}, 401, 1),
    ({"error": {"message": "so it is", "status": 503}}, 503, 3),
    ({"object": "error", "message": "so it is", "code": 500}, 500, 3),
    ({"error": {"message": "so it is", "type": "rate_limit_error"}}, 429, 3),
    ({"error": "so it\nis"}, 400, 1),
    ({"error": {"message": "so it is: overloaded", "code": None}}, 429, 3),
    ({"detail": "so it is"}, 400, 1),
    ({"error": {"message": "so it is", "code": "invalid_api_key"}}, 401, 1),
    ({"error": True, "message": "so it is: rate limit"}, 429, 3),
    ({"error": True, "message": "so it is"}, 400, 1),
    ({"error_code": 18, "error_msg": "so it is: request limit reached"}, 429, 3),
    ({"error_msg": "so it is"}, 400, 1),
    ({"choices": None, "base_resp": {"status_code": 1002, "status_msg": "so it is"}}, 400, 1),
    ({"choices": [{"error": {"message": "so it is", "code": 502}, "finish_reason": "error",
                   "message": {"role": "assistant", "content": "hal"}}]}, 502, 3),
    (completion(None) | {"error": {"message": "so it is", "code": 504}}, 504, 3),
])
def test_an_error_inside_a_200_counts_as_the_status_that_it_names(serve, body, status, attempts):
    server = serve(lambda _, earlier: (200, QUICK, body))
    [[reply]] = ServerChat(server.url, "first", max_retries=2).sample([says("x")], [[1]])
    assert isinstance(reply, Exception) and "so it is" in str(reply)
    assert f"error {status}" in str(reply)
    assert len(server.requests) == attempts and "\n" not in str(reply)
    with pytest.raises(UserError, match="so it is"):
        ServerChat(server.url, "first", max_retries=0).check()
    mended = serve(lambda _, earlier: "hello" if earlier else (200, QUICK, body))
    [[reply]] = ServerChat(mended.url, "first", max_retries=2).sample([says("x")], [[1]])
    assert (reply == heard("hello")) == (attempts > 1)


@pytest.mark.parametrize("body", [completion("hello") | {"error": None},
                                  completion("hello") | {"error": ""},
                                  completion("hello") | {"code": 0, "message": "success"}])
def test_a_completion_is_not_an_error(serve, body):
    server = serve(lambda _, earlier: (200, {}, body))
    assert ServerChat(server.url, "first").sample([says("x")], [[1]]) == [[heard("hello")]]


@pytest.mark.parametrize("body", [
    "", "<html>a proxy</html>", "[]", '"hello"', "null",
    '{"choices": {}}', '{"choices": [1]}', '{"choices": [{}]}',
    '{"choices": [{"message": null}]}', "[" * 20_000])
def test_a_body_that_is_not_a_completion_is_reported_in_one_line(serve, body):
    server = serve(lambda _, earlier: (200, {"Content-Type": "application/json"}, body))
    [[reply]] = ServerChat(server.url, "first").sample([says("x")], [[1]])
    assert isinstance(reply, Exception) and "\n" not in str(reply) and len(str(reply)) < 400
    assert "not a chat completion" in str(reply) or len(body) > 1000


@pytest.mark.parametrize("status, words", [
    (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
    (400, "System role not supported"),
    (500, "Internal Server Error"), (422, "Template error: unknown method"),
    (200, "Only user and assistant roles are supported!"),
    (400, "messages[0].role: 'system' is not one of the roles"),
    (400, "Developer instruction is not enabled for models/gemma"),
])
def test_a_server_without_a_system_role(serve, status, words, capsys):
    def behave(body, earlier):
        refusal = {"error": {"message": words, "code": max(status, 400)}}
        return (status, QUICK, refusal) if body["messages"][0]["role"] == "system" else last(body)
    server = serve(behave)
    dialogue = [{"role": "system", "content": "Ask."}, *says("Please."),
                {"role": "assistant", "content": "a"},
                *says("b")]
    chat = ServerChat(server.url, "first", concurrency=6, max_retries=0)
    for _ in range(2):  # the first six find out together, later ones know
        assert chat.sample([dialogue] * 3, [[1, 2]] * 3) == [[heard("b")] * 2] * 3
        assert sum(body["messages"][0]["role"] == "system" for body in server.requests) <= 6
    assert server.requests[-1]["messages"] == [*says("Ask.\n\nPlease."), *dialogue[2:]]
    assert capsys.readouterr().err.count("takes no system role") == 1


def test_a_server_without_system_role_and_seed_and_one_that_only_mentions_them(serve, capsys):
    def behave(body, earlier):
        has_system = body["messages"][0]["role"] == "system"
        trouble = "seed: not allowed" if "seed" in body else "bad role" if has_system else None
        return (400, {}, {"error": {"message": trouble}}) if trouble else "hello"
    server = serve(behave)
    dialogue = [{"role": "system", "content": "Ask."}, *says("Please.")]
    chat = ServerChat(server.url, "first")
    assert [chat.sample([dialogue], [[1]]) for _ in range(2)] == [[[heard("hello")]]] * 2
    assert "seed" not in server.requests[-1] and len(server.requests[-1]["messages"]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    too_long = {"error": {"message": "too long: the role of a seed in a system"}}
    long = serve(lambda body, earlier: (400, {}, too_long) if last(body).endswith("Please.")
                 else "hello")
    chat = ServerChat(long.url, "first")
    [[first], [second]] = chat.sample([dialogue, [dialogue[0], *says("x")]], [[1], [1]])
    assert "too long" in str(first) and second.text == "hello"
    assert long.requests[-1]["messages"][0]["role"] == "system"
    assert capsys.readouterr().err == ""


def test_a_template_that_opens_the_thoughts_is_noticed_by_check(serve):
    """Cut by the limit on tokens, such a reply has no tag at all."""
    def thinking(body, earlier):
        if last(body) == "Hello":
            return "He says hello.\n</think>\n\nHello!"
        return 200, {}, completion("The hidden code says", reason="length")
    server = serve(thinking)
    chat = ServerChat(server.url, "first")
    chat.check()
    [[reply]] = chat.sample([says("x")], [[1]])
    assert isinstance(reply, OnlyThoughts)

    def cut(body, earlier):
        reason = "length" if last(body) == "x" else "stop"
        return 200, {}, completion("word word", reason=reason)
    plain = serve(cut)
    chat = ServerChat(plain.url, "first")
    chat.check()
    assert chat.sample([says("x")], [[1]]) == [[heard("word word", cut=True)]]


@pytest.mark.parametrize("longer, is_thought", [
    ("He says hello.\n</think>\n\nHello!", True), ("He says hello.</think>Hello!", True),
    ("Hello, and so on.", False),
    ("<think>He says hello.</think>Hello!", False), (None, True), (500, True)])
def test_a_greeting_cut_before_any_tag_is_sampled_again_at_length(serve, longer, is_thought):
    def behave(body, earlier):
        if last(body) != "Hello" or body["max_tokens"] < 1000 or longer is None:
            return 200, {}, completion("The hidden code says", reason="length")
        return (500, QUICK, {"error": {"message": "no"}}) if longer == 500 else longer
    server = serve(behave)
    chat = ServerChat(server.url, "first", max_retries=0)
    chat.check()
    assert [body["max_tokens"] for body in server.requests][:2] == [256, 4096]
    [[reply]] = chat.sample([says("x")], [[1]])
    assert isinstance(reply, OnlyThoughts) == is_thought
    assert is_thought or reply == heard("The hidden code says", cut=True)
    server.requests.clear()
    chat.check()
    assert [body["max_tokens"] for body in server.requests][0] == 1


def test_a_greeting_cut_within_its_tags_or_by_a_small_server_is_not_sampled_again(serve):
    for message in (completion("<think>He says", reason="length"),
                    completion("hm", reason="length", reasoning="so"),
                    completion(None, reason="length")):
        server = serve(lambda body, earlier: (200, {}, message))
        ServerChat(server.url, "first").check()
        assert {body["max_tokens"] for body in server.requests} == {256}

    def behave(body, earlier):
        if body["max_tokens"] > 9:
            return 400, {}, {"error": {"message": "too long"}}
        return 200, {}, completion("Hel", reason="length")
    small = serve(behave)
    ServerChat(small.url, "first").check()
    assert [body["max_tokens"] for body in small.requests] == [256, 1]


def test_an_answer_about_tags_does_not_turn_replies_into_thoughts(serve):
    answer = ('I WANT TO ANSWER:\ndef f(s):\n    """Drop all up to\n</think>\n"""\n'
              '    return s.split("</think>")[-1]')
    cut = 200, {}, completion("and so on", reason="length")
    server = serve(lambda body, earlier: cut if last(body) == "x" else answer)
    chat = ServerChat(server.url, "first", concurrency=1)
    assert (chat.sample([says("y"), says("x")], [[1], [1]]) ==
            [[heard(answer, 3)], [heard("and so on", cut=True)]])


@pytest.mark.parametrize("body, words", [
    ("context length exceeded", "error 400: context length exceeded"),
    ("x" * 999, "error 400: " + "x" * 150),
    ("<html><title>413 Too Large</title><p>no</p></html>", "error 400: 413 Too Large no"),
    ([{"error": {"message": "API key not valid"}}], "API key not valid"),
    (["so it is"], "so it is")])
def test_the_words_of_an_error_that_is_not_an_object(serve, body, words):
    server = serve(lambda _, earlier: (400, {}, body))
    [[reply]] = ServerChat(server.url, "first").sample([says("x")], [[1]])
    assert words in str(reply) and "<" not in str(reply) and "x" * 151 not in str(reply)


@pytest.mark.parametrize("status, body", [
    (400, {"error": "Only user and assistant roles are supported!"}),
    (200, {"error": "Unknown role: system"}),
    (422, {"error": "Template error: system role not supported", "error_type": "template_error"}),
    (400, {"detail": "System role not supported"}),
    (422, {"detail": [{"msg": "roles must alternate"}]}),
    (500, "Sorry"), (500, ""),
    (400, [{"error": {"message": "system instruction is not supported"}}]),
    (400, "Conversation roles must alternate")])
def test_a_refusal_of_the_system_role_in_any_shape(serve, status, body):
    def behave(sent, earlier):
        has_system = sent["messages"][0]["role"] == "system"
        return (status, {}, body) if has_system else last(sent)
    server = serve(behave)
    dialogue = [{"role": "system", "content": "Ask."}, *says("b")]
    chat = ServerChat(server.url, "first", max_retries=0)
    assert chat.sample([dialogue], [[1]]) == [[heard("Ask.\n\nb")]]


@pytest.mark.parametrize("body", [
    {"object": "error", "message": {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs"}]}},
    [{"error": {"message": "Invalid value at 'generation_config.seed'"}}],
    {"detail": "seed is not known"}, "no seed"])
def test_a_refusal_of_the_seed_in_any_shape(serve, body):
    server = serve(lambda sent, earlier: (422, {}, body) if "seed" in sent else "without")
    assert ServerChat(server.url, "first").sample([says("x")], [[1]]) == [[heard("without")]]


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_without_seeds(serve, status, capsys):
    def behave(body, earlier):
        refusal = {"error": {"message": "Unrecognized request argument supplied: seed"}}
        return (status, {}, refusal) if "seed" in body else "without"
    server = serve(behave)
    chat = ServerChat(server.url, "first", concurrency=6)
    for _ in range(2):  # the first six find out together, later ones know
        assert chat.sample([says("x")] * 3, [[1, 2]] * 3) == [[heard("without")] * 2] * 3
        assert sum("seed" in body for body in server.requests) <= 6
    assert capsys.readouterr().err.count("refuses the seed") == 1


def test_an_error_that_quotes_a_prompt_about_seeds_is_not_a_refusal_of_seeds(serve, capsys):
    def behave(body, earlier):
        too_long = 400, {}, {"error": {"message": f"too long: {last(body)}"}}
        return too_long if "plant" in last(body) else str(body["seed"])
    server = serve(behave)
    chat = ServerChat(server.url, "first", concurrency=1)
    (long,), (short,) = chat.sample([says("where to plant a seed"), says("x")], [[4], [5]])
    assert isinstance(long, Exception) and short.text == "5" and capsys.readouterr().err == ""


def test_no_key_password_or_query_in_any_message(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    basic = base64.b64encode(b"user:pass-word").decode()
    secrets = ("sk-very-secret", "pass-word", "token-value", basic)

    def behave(body, earlier):
        return 401, {}, {"error": {"message": f"Wrong: {server.key}, {server.path}, {login}"}}
    for login, sent in [("", "Bearer sk-very-secret"), ("user:pass-word@", f"Basic {basic}")]:
        server = serve(behave)
        url = server.url.replace("http://", f"http://{login}") + "/v1?access=token-value"
        (reply,), = ServerChat(url, "first").sample([says("x")], [[1]])
        # the server got them and quotes them
        assert server.key == sent and "access=token-value" in server.path
        with pytest.raises(UserError) as refused:
            ServerChat(url, "first").check()
        server.close()
        (gone,), = ServerChat(url, "first", max_retries=0).sample([says("x")], [[1]])
        with pytest.raises(UserError) as silent:
            ServerChat(url, "first").check()
        for error in (reply, refused.value, gone, silent.value):
            words = f"{error} {error!r} {error.__cause__!r}"
            assert isinstance(error, Exception) and f"{server.url}/v1" in words
            assert not [secret for secret in secrets if secret in words]
    with pytest.raises(UserError) as wrong:
        ServerChat("ftp://user:pass-word@host/")
    assert "pass-word" not in str(wrong.value)


def test_check_finds_the_model(serve):
    server = serve()
    chat = ServerChat(server.url + "/v1/")
    chat.check()
    assert chat.model == "first" and last(server.requests[-1]) == "Hello"
    lazy = ServerChat(server.url)
    assert lazy.sample([says("x")], [[1]]) == [[heard("hello")]] and lazy.model == "first"
    quiet = serve(models=404)  # it need not list models if the model is named
    ServerChat(quiet.url, "mine").check()
    assert quiet.requests[-1]["model"] == "mine"
    mute = serve(lambda body, earlier: (200, {}, completion(None, reason="length")))
    ServerChat(mute.url).check()  # it need not reply with text


def test_check_reports_what_is_wrong_in_one_line(serve):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match="no answer; is the server up") as error:
        ServerChat(refusing).check()
    assert refusing in str(error.value)
    missing = {"error": {"message": "The model `third` does not exist."}}
    for server, model, words in [
            (serve(lambda body, earlier: (404, {}, missing)),
             "third", ["third", "does not exist", "first, second"]),
            (serve(models=()), None, ["lists no model"]),
            (serve(models=500), None, ["lists no model", "no list here"]),
            (serve(lambda body, earlier: (200, {}, "<html>")), "first", ["not a chat completion"])]:
        with pytest.raises(UserError) as error:
            ServerChat(server.url, model, max_retries=0).check()
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    for address in ("localhost:8000", "file:///etc/hosts",
                    "http://", "http://host:port/v1", "http://[::1"):
        with pytest.raises(UserError, match="an address such as"):
            ServerChat(address)


def test_ctrl_c_does_not_wait_for_requests_in_flight(serve):
    server = serve(lambda body, earlier: "hang")
    code = ("import sys\n"
            "from colbench.run.errors import run_main\n"
            "from colbench.lm.server import ServerChat\n"
            "chat = ServerChat(sys.argv[1], 'first')\n"
            "run_main(lambda: chat.sample([[{'role': 'user', 'content': 'x'}]] * 9, [[1]] * 9))")
    user = subprocess.Popen([sys.executable, "-c", code, server.url],
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)},
                            # a shell's background jobs ignore it
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while len(server.requests) < 9:
        assert user.poll() is None
        time.sleep(0.05)
    user.send_signal(signal.SIGINT)
    err = user.communicate(timeout=60)[1]
    assert user.returncode == 130 and err == "interrupted: run the same command to resume\n"
