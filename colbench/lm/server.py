"""Chat with an OpenAI-compatible server: vLLM, llama.cpp, `transformers serve`, a paid API."""
import base64
import json
import os
import queue
import re
import sys
import threading
from urllib.parse import unquote, urlsplit

from colbench.lm.texts import NoText, OnlyThoughts, Reply, clean, has_tag, spent_on, thinks_first
from colbench.run.errors import UserError
from colbench.run.files import seed_of
from colbench.run.settings import hide_password
from colbench.run.variables import http_client

# what some servers refuse: name -> (pattern in the words of the error, what stderr says)
REFUSED = {
    "seed": (r"\bseed\b", "refuses the seed parameter; its samples cannot be repeated"),
    "system": (r"\broles?\b|\bsystem\b|alternat|template|instruction|jinja|internal server error|"
               r"(?m:^error code: 500$)",
               "takes no system role; the system prompt goes in front of the first message"),
}
# finish reasons of replies that broke off
FAILED = ("error|filter|abort|cancel|safety|prohibit|blocklist|recitation|sensitive|refus|fail|"
          "time.?out|insufficient")


def is_address(text) -> bool:
    """Whether `text` is the address of a server, not the id or folder of a model."""
    return str(text).startswith(("http://", "https://"))


class ServerChat:
    """Samples chat messages from a server. Same `sample` as colbench.lm.sampling.LocalChat.

    repeatable: whether equal calls give equal messages; a server batches requests as it likes.

    The openai client does the retries (connection errors, time-outs, 408, 409, 429, 5xx), the
    back-off and Retry-After. An error inside a 200 counts as the status that it names. A request
    that the server refuses for good, such as a dialogue longer than its context (400), is sent
    once.
    """

    repeatable = False

    def __init__(self, base_url, model=None, api_key=None, timeout=120, max_retries=4,
                 concurrency=32):
        """base_url: `http://host:port` means `http://host:port/v1`; a final `#NAME` is the model.

        model None: the first one that the server lists. api_key None: OPENAI_API_KEY from the
        environment, else "EMPTY". timeout: seconds of silence from the server.
        """
        try:
            import openai
        except ImportError:
            raise UserError("a model server needs the openai package: pip install openai") from None
        try:
            parts = urlsplit(base_url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is not a number, a broken IPv6 address
            usable = False
        if not usable:
            raise UserError(f"{hide_password(base_url).rpartition('@')[2]}: "
                            "expected an address such as http://127.0.0.1:8000/v1")
        if parts.path in ("", "/"):
            parts = parts._replace(path="/v1")
        self.model = model or unquote(parts.fragment) or None
        parts = parts._replace(fragment="")
        host = parts.netloc.rpartition("@")[2]
        self.address = f"{parts.scheme}://{host}{parts.path}"  # for messages: no password or query
        self.concurrency = concurrency
        api_key = api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        secrets = [api_key, parts.password, login.partition(":")[2],
                   base64.b64encode(login.encode()).decode(), parts.query,
                   *(pair.partition("=")[2] for pair in parts.query.split("&"))]
        self._secrets = sorted({s for s in secrets if s and len(s) > 5}, key=len, reverse=True)
        self._takes = {}  # name in REFUSED -> whether the server takes it, once known
        self._greeted = False  # whether `check` got an answer
        self._thinks_first = False  # whether the server's template opens the thoughts of a reply
        self.requests = 0  # HTTP requests for messages so far
        self.retries = 0  # how many of them were retries by the client
        self._counting = threading.Lock()
        # of the latest reply: whether its first tag closes thoughts, whether it is cut before any
        self._latest = False, False
        # ends a request to a server that sends a byte now and then and so never times out;
        # the client waits at most 60 s for a Retry-After
        self._patience = (max_retries + 1) * (timeout + 60)
        hooks = {"request": [self._count], "response": [_set_error_status]}
        self._client = openai.OpenAI(
            base_url=parts.geturl(), api_key=api_key, max_retries=max_retries,
            timeout=openai.Timeout(timeout, connect=min(timeout, 10)),
            http_client=http_client(parts, event_hooks=hooks))

    def _count(self, request):
        if request.method == "POST":
            with self._counting:
                self.requests += 1
                self.retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    def check(self):
        """Find the model and sample a greeting. UserError if the server is down or refuses."""
        import openai
        listed = []
        problem = None
        try:
            models = self._client.with_options(timeout=10, max_retries=1).models.list()
            listed = [model.id for model in models.data]
        except openai.APIConnectionError:
            raise UserError(f"{self.address}: no answer; is the server up?") from None
        except Exception as error:  # some servers list no models: fine if the user names one
            problem = self._describe(error)
        if self.model is None:
            if not listed:
                raise UserError(f"{self.address}: the server lists no model; "
                                f"name one ({problem or 'empty list'})")
            self.model = listed[0]
        hello = [{"role": "user", "content": "Hello"}]
        # the first greeting is long enough to show whether replies begin within thoughts;
        # 1 token if the server has no room for that
        for length in (1,) if self._greeted else (256, 1):
            probe = self._sample_one(hello, 0, 0.0, length, None)
            self._greeted = not isinstance(probe, Exception) or isinstance(probe, NoText)
            if self._greeted:
                break
        else:
            known = ""
            if listed and self.model not in listed:
                known = f"; the server lists {', '.join(listed[:5])}"
            raise UserError(f"model {self.model}: {probe}{known}")
        if length > 1 and self._latest[1]:  # perhaps thoughts, which may tell hidden information
            self._sample_one(hello, 0, 0.0, 4096, None)
            self._thinks_first |= self._latest[1]
        self._thinks_first |= self._latest[0]

    def sample(self, conversations, seeds, temperature=1.0, max_new_tokens=1024, stop=None):
        """One message per seed of each conversation; at most `concurrency` requests at once.

        conversations: B lists of {"role", "content"}. seeds: B lists of ints. stop: a list of
        strings. Each seed is a request of its own: a sample does not depend on its siblings, and
        the server's prefix cache makes the repeated prompt cheap. Returns B lists of Reply, in the
        order of the seeds, with an Exception in place of each request that failed.
        """
        if self.model is None:
            self.check()
        results = [[None] * len(row) for row in seeds]
        todo = queue.SimpleQueue()
        for b, row in enumerate(seeds):
            for s in range(len(row)):
                todo.put((b, s))

        def send_requests():
            while True:
                try:
                    b, s = todo.get_nowait()
                except queue.Empty:
                    return
                results[b][s] = self._sample_one(conversations[b], seeds[b][s], temperature,
                                                 max_new_tokens, stop)

        # daemon threads, not an executor: Ctrl-C must not wait for the requests in flight
        count = min(self.concurrency, todo.qsize())
        threads = [threading.Thread(target=send_requests, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _sample_one(self, messages, seed, temperature, max_new_tokens, stop):
        """A Reply or an Exception; never raises. Samples a reply without text once more."""
        tries = []
        for used_seed in (seed, seed_of(seed, "again")):
            outcome = queue.SimpleQueue()
            arguments = (outcome, messages, used_seed, temperature, max_new_tokens, stop)
            threading.Thread(target=self._attempt, args=arguments, daemon=True).start()
            try:
                reply = outcome.get(timeout=self._patience)
            except queue.Empty:
                return RuntimeError(f"{self.address}: no complete reply in {self._patience:.0f} s")
            tries.append(reply)
            if isinstance(reply, Reply):
                return reply._replace(spent=spent_on(*tries))
            if not isinstance(reply, NoText):
                return reply
        return type(reply)(f"{reply}, twice", spent_on(*tries))

    def _attempt(self, outcome, *request):
        try:
            outcome.put(self._read(self._request(*request)))
        except NoText as error:
            outcome.put(type(error)(self._describe(error), error.spent))
        except Exception as error:  # any error must cost only this message
            outcome.put(RuntimeError(self._describe(error)))

    def _request(self, messages, seed, temperature, max_new_tokens, stop):
        """The server's response. Leaves out what the server refuses; finds that out if need be."""
        import openai
        errors = (openai.BadRequestError, openai.UnprocessableEntityError,
                  openai.InternalServerError)
        messages = [{"role": m["role"], "content": _as_utf8(m["content"])} for m in messages]
        settings = dict(model=self.model, temperature=temperature, max_tokens=max_new_tokens)
        if stop is not None:
            settings["stop"] = stop
        has_system = messages[0]["role"] == "system" and len(messages) > 1

        def ask(left_out):
            fold = has_system and "system" in left_out
            return self._client.chat.completions.with_raw_response.create(
                messages=_folded(messages) if fold else messages, **settings,
                **({} if "seed" in left_out else {"seed": seed}))

        used = {"seed", "system"} if has_system else {"seed"}
        known = {name for name in used if self._takes.get(name) is False}
        try:
            response = ask(known)
            self._takes |= dict.fromkeys(used - known, True)
            return response
        except errors as error:
            if error.status_code not in (400, 422, 500):
                raise
            refusal = error
            words = f"{error}\n{error.response.text}"

        def suspect(name):
            return (self._takes.get(name) is not True
                    and re.search(REFUSED[name][0], words, re.IGNORECASE))

        for more in ({"seed"}, {"system"}, {"seed", "system"}):
            if more <= used - known and all(map(suspect, more)):
                try:
                    response = ask(known | more)
                except errors as error:  # the first error may only have quoted the prompt
                    refusal = error
                    words = f"{words}\n{error}\n{error.response.text}"
                    continue
                for name in more:
                    if self._takes.get(name) is not False:
                        self._takes[name] = False
                        print(f"{self.address}: {REFUSED[name][1]}", file=sys.stderr)
                return response
        raise refusal

    def _read(self, response):
        """The Reply in a response. NoText if it has no text, ValueError if it is no completion."""
        try:
            body = json.loads(response.text)
            choice = body["choices"][0]
            message = choice["message"]
            reason = choice.get("finish_reason")
            content = message.get("content")
            parts = content if isinstance(content, list) else ()
            refusal = [part["refusal"] for part in (message, *parts)
                       if isinstance(part, dict) and part.get("refusal")]
        except (ValueError, AttributeError, IndexError, KeyError, TypeError):
            page = response.text.lstrip()[:1] in ("<", "")
            raise ValueError("the response is not a chat completion; is this the address of an "
                             "OpenAI-compatible API?"
                             + ("" if page else f" {response.text[:150]}")) from None
        reasoning = ""
        for name in ("reasoning_content", "reasoning", "thinking", "thoughts", "reasoning_details"):
            reasoning = reasoning or "\n\n".join(filter(None, _said_and_thought(message.get(name))))
        usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
        read, written = (n if type(n) is int else None
                         for n in map(usage.get, ("prompt_tokens", "completion_tokens")))
        spent = None if None in (read, written) else (read, written)
        text, thoughts = _said_and_thought(content)
        cut = reason == "length"
        first = thinks_first(text)
        self._latest = first, cut and not reasoning and bool(text.strip()) and not has_tag(text)
        self._thinks_first |= thinks_first(text, alone=True)
        # cut within thoughts that the prompt opened, a reply has no tag
        text, inside = clean(text, opened=self._thinks_first and (first or cut))
        thoughts = "\n\n".join(filter(None, (reasoning, thoughts, inside)))
        if re.search(FAILED, str(reason), re.IGNORECASE):
            raise NoText(f"the reply broke off (finish reason: {reason})", spent)
        if not text and refusal:
            raise NoText(f"the model refuses: {refusal[0]}", spent)
        if not text and thoughts:
            raise OnlyThoughts(f"a reply without text, only thoughts (finish reason: {reason})",
                               spent)
        if not text:
            called = message.get("tool_calls") or message.get("function_call")
            calls = ", only a tool call" if called else ""
            raise NoText(f"a reply without text{calls} (finish reason: {reason})", spent)
        return Reply(text, written, thoughts, spent, cut)

    def _describe(self, error):
        """The error in one line, with the address and without key, password or query."""
        text = " ".join(str(error).split()) or type(error).__name__
        response = getattr(error, "response", None)
        if stated := _error_in(response):
            words, status = stated
            text = f"error {status}: {words}"
        elif response is not None:
            if words := re.sub(r"<[^<>]*>", " ", response.text[:2000]).split():
                text = f"error {response.status_code}: {' '.join(words)[:150]}"
        if (isinstance(error.__cause__, Exception)
                and str(error) in ("Connection error.", "Request timed out.")):
            text = f"{text} ({type(error.__cause__).__name__})"
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return f"{self.address}: {text[:300]}"


def _as_utf8(content):
    """A message's text or parts with "?" for half a surrogate pair, which UTF-8 cannot encode."""
    if isinstance(content, list):
        return [part | {"text": _as_utf8(part["text"])} if "text" in part else part
                for part in content]
    return content.encode("utf-8", "replace").decode()


def _folded(messages):
    """The dialogue with the system prompt in front of the first message, as in lm/tokens.py."""
    system, first, *rest = messages
    content = f"{system['content']}\n\n{first['content']}"
    return [{"role": first["role"], "content": content}, *rest]


def _said_and_thought(content):
    """(text, thoughts) of a message's content: a string, a part, a list of parts, a number."""
    if content is None or content == "":
        return "", ""
    if isinstance(content, str):
        return content, ""
    if isinstance(content, list):
        texts, thoughts = zip(*map(_said_and_thought, content)) if content else ((), ())
        return "".join(texts), "\n".join(filter(None, thoughts))
    if not isinstance(content, dict):
        return json.dumps(content), ""
    keys = ("text", "thinking", "reasoning", "thought", "content", "value", "summary", "parts")
    key = next((key for key in keys
                if content.get(key) and isinstance(content[key], (str, list, dict))), None)
    text, thoughts = _said_and_thought(content.get(key))
    kind = f"{content.get('type')} {key}"
    if content.get("thought") is True or re.search("think|thought|reason|summary", kind):
        return "", "\n".join(filter(None, (thoughts, text)))
    return text, thoughts


def _set_error_status(response):
    """Give an error inside a 200 the status that it names, so that the client treats it as such."""
    if response.status_code == 200:
        response.read()
        if stated := _error_in(response):
            response.status_code = stated[1]


def _error_in(response):
    """(the server's words, HTTP status) of the error object in a response, or None."""
    try:
        body = response.json()
        choice = (body.get("choices") or [{}])[0]
        error = choice.get("error") or body.get("error")
        has_text = (not choice.get("error") and
                    any(_said_and_thought((choice.get("message") or {}).get("content"))))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None
    if not choice and not error and "data" not in body:  # no completion and no list of models
        names = {"message", "detail", "errors", "msg", "base_resp", "error_msg", "error_code"}
        error = body if body.keys() & names else None
    if not error or has_text:
        return None
    if not isinstance(error, (str, dict, list)):  # {"error": true, "message": ...}
        error = body.get("message") or body
    words = error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)
    words = " ".join(words.split())
    if response.status_code != 200:
        return words, response.status_code
    for source in (error, body):
        if isinstance(source, dict):
            for name in ("code", "status", "status_code", "http_code"):
                if re.fullmatch("[45][0-9][0-9]", str(source.get(name))):
                    return words, int(source[name])
    for status, pattern in (
            (429, "rate.?limit|too many|overload|exhausted|quota|limit reached"),
            (401, "api.?key|authenti|authori"),
            (503, "time.?out|timed out|unavailable|upstream|gateway|internal|server.?error")):
        if re.search(pattern, words, re.IGNORECASE):
            return words, status
    return words, 400
