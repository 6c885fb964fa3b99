"""The chat interface over any OpenAI-compatible server (vLLM, llama.cpp, `transformers serve`, a paid API)."""
import base64
import os
import queue
import re
import sys
import threading
from collections import namedtuple
from urllib.parse import unquote, urlsplit

from colbench.run.errors import UserError
from colbench.run.files import seed_of
from colbench.run.settings import hide_password

Reply = namedtuple("Reply", "text tokens")  # tokens: how many were generated, or None where the server does not say


def is_address(text) -> bool:
    """Whether `text` is the address of a server, and no model's id or folder."""
    return str(text).startswith(("http://", "https://"))


class ServerChat:
    """Samples chat messages from a server. Same `sample` as colbench.lm.sampling.LocalChat.

    repeatable: whether equal calls give equal messages. A server puts requests together as it likes.

    Retries (connection errors, time-outs, 408, 409, 429, 5xx), back-off and Retry-After are the openai client's own; a
    request that the server refuses for good, such as a dialogue longer than its context (400), is sent once.
    """

    repeatable = False

    def __init__(self, base_url, model=None, api_key=None, timeout=120, max_retries=4, concurrency=32):
        """base_url: `http://host:port` means `http://host:port/v1`; `http://host:port#NAME` names the model too.

        model None: the first one that the server lists. api_key None: the environment's OPENAI_API_KEY, else "EMPTY".
        timeout: seconds of silence from the server.
        """
        try:
            import openai
        except ImportError:
            raise UserError("talking to a model server needs the openai package: pip install openai") from None
        try:
            parts = urlsplit(base_url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, a broken IPv6 address
            usable = False
        if not usable:
            raise UserError(f"{hide_password(base_url).rpartition('@')[2]}: "
                            "an address such as http://127.0.0.1:8000/v1 is wanted")
        if parts.path in ("", "/"):
            parts = parts._replace(path="/v1")
        model, parts = model or unquote(parts.fragment) or None, parts._replace(fragment="")
        host = parts.netloc.rpartition("@")[2]
        self.address = f"{parts.scheme}://{host}{parts.path}"  # for messages: no user, password or query
        self.model = model
        self.concurrency = concurrency
        api_key = api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        secrets = [api_key, parts.password, login.partition(":")[2], base64.b64encode(login.encode()).decode(),
                   parts.query, *(pair.partition("=")[2] for pair in parts.query.split("&"))]
        self._secrets = sorted({s for s in secrets if s and len(s) > 5}, key=len, reverse=True)
        self._seed_accepted = True
        # a server that sends a byte now and then is never silent: this ends it. The client waits for a Retry-After of
        # up to 60 s
        self._patience = (max_retries + 1) * (timeout + 60)
        self._client = openai.OpenAI(base_url=parts.geturl(), api_key=api_key, max_retries=max_retries,
                                     timeout=openai.Timeout(timeout, connect=min(timeout, 10)))

    def check(self):
        """Settle the model and sample one token from it. UserError if the server cannot be reached or refuses."""
        import openai
        listed, problem = [], None
        try:
            models = self._client.with_options(timeout=10, max_retries=1).models.list()
            listed = [model.id for model in models.data]
        except openai.APIConnectionError:
            raise UserError(f"{self.address}: no answer; is the server up?") from None
        except Exception as error:  # some servers list no models, or no JSON at all: fine where the user names one
            problem = self._words(error)
        if self.model is None:
            if not listed:
                raise UserError(f"{self.address}: the server lists no model; name one ({problem or 'empty list'})")
            self.model = listed[0]
        probe = self._sample_one([{"role": "user", "content": "Hello"}], 0, 0.0, 1, None, may_be_empty=True)
        if isinstance(probe, Exception):
            known = f"; the server lists {', '.join(listed[:5])}" if listed and self.model not in listed else ""
            raise UserError(f"model {self.model}: {probe}{known}")

    def sample(self, conversations, seeds, temperature=1.0, max_new_tokens=1024, stop=None):
        """One message per seed for every conversation, all requests in flight at once (at most `concurrency`).

        conversations: B lists of {"role", "content"}. seeds: B lists of ints; one request per seed: a sample does not
        depend on its siblings, and the server's prefix cache makes the repeated prompt cheap. stop: a list of texts.
        Returns B lists of Reply, in the order of the seeds; a request that failed has an Exception in its place.
        """
        if self.model is None:
            self.check()
        results = [[None] * len(row) for row in seeds]
        todo = queue.SimpleQueue()
        for b, row in enumerate(seeds):
            for s in range(len(row)):
                todo.put((b, s))

        def work():
            while True:
                try:
                    b, s = todo.get_nowait()
                except queue.Empty:
                    return
                results[b][s] = self._sample_one(conversations[b], seeds[b][s], temperature, max_new_tokens, stop)

        # daemon threads and not an executor: Ctrl-C must not wait for the requests in flight
        count = min(self.concurrency, todo.qsize())
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _sample_one(self, messages, seed, temperature, max_new_tokens, stop, may_be_empty=False):
        """A Reply or an Exception; never raises. A reply without text is asked for once more, with another seed."""
        for used_seed in (seed, seed_of(seed, "again")):
            outcome = queue.SimpleQueue()
            arguments = (outcome, messages, used_seed, temperature, max_new_tokens, stop)
            threading.Thread(target=self._attempt, args=arguments, daemon=True).start()
            try:
                reply, reason = outcome.get(timeout=self._patience)
            except queue.Empty:
                return RuntimeError(f"{self.address}: no whole reply in {self._patience:.0f} s")
            if isinstance(reply, Exception):
                return reply
            if reply.text or may_be_empty:
                return reply
        return RuntimeError(f"{self.address}: a reply without text, twice (finish reason: {reason})")

    def _attempt(self, outcome, *request):
        try:
            outcome.put(self._request(*request))
        except Exception as error:  # whatever it is, it must cost this one message and no other
            outcome.put((RuntimeError(self._words(error)), None))

    def _request(self, messages, seed, temperature, max_new_tokens, stop):
        import openai
        settings = dict(model=self.model,
                        messages=[{"role": m["role"], "content": _whole(m["content"])} for m in messages],
                        temperature=temperature, max_tokens=max_new_tokens)
        if stop is not None:
            settings["stop"] = stop
        create = self._client.chat.completions.create
        if not self._seed_accepted:
            return _reply(create(**settings))
        try:
            return _reply(create(**settings, seed=seed))
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if not re.search(r"\bseed\b", str(error)):
                raise
            reply = _reply(create(**settings))  # the word may stand in a quoted prompt: this request tells
            if self._seed_accepted:
                self._seed_accepted = False
                print(f"{self.address}: refuses the seed parameter; its samples cannot be repeated", file=sys.stderr)
            return reply

    def _words(self, error):
        """The error in one line, with the address and without key, password or query."""
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error.__cause__, Exception) and str(error) in ("Connection error.", "Request timed out."):
            text = f"{text} ({type(error.__cause__).__name__})"
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return f"{self.address}: {text[:300]}"


def _whole(content):
    """A message's text or parts, half a surrogate pair as a question mark: UTF-8 has no bytes for it."""
    if isinstance(content, list):
        return [part | {"text": _whole(part["text"])} if "text" in part else part for part in content]
    return content.encode("utf-8", "replace").decode()


def _reply(response):
    """(Reply, finish reason) from a chat completion. ValueError if it is something else, such as a web page."""
    try:
        choice = response.choices[0]
        text, reason = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        raise ValueError("the answer is no chat completion; is this the address of an OpenAI-compatible API?") from None
    usage = getattr(response, "usage", None)
    return Reply(text or "", usage.completion_tokens if usage else None), reason
