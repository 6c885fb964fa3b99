"""The chat interface over any OpenAI-compatible server (vLLM, llama.cpp, `transformers serve`, a paid API)."""
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

# what some servers refuse: the words of the error in which it shows, and what is done about it
REFUSED = {
    "seed": (r"\bseed\b", "refuses the seed parameter; its samples cannot be repeated"),
    "system": (r"\broles?\b|\bsystem\b|alternat|template|instruction|jinja|internal server error|"
               r"(?m:^error code: 500$)",
               "takes no system role; the system text goes in front of the first message"),
}
FAILED = r"error|filter|abort|cancel|safety|prohibit|blocklist|recitation|sensitive|refus|fail|time.?out|insufficient"


def is_address(text) -> bool:
    """Whether `text` is the address of a server, and no model's id or folder."""
    return str(text).startswith(("http://", "https://"))


class ServerChat:
    """Samples chat messages from a server. Same `sample` as colbench.lm.sampling.LocalChat.

    repeatable: whether equal calls give equal messages. A server puts requests together as it likes.

    Retries (connection errors, time-outs, 408, 409, 429, 5xx), back-off and Retry-After are the openai client's own; an
    error that comes with status 200 is treated as the status that it names. A request that the server refuses for good,
    such as a dialogue longer than its context (400), is sent once.
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
        self._takes = {}  # name in REFUSED -> whether the server takes it, once that is known
        self._greeted = False  # whether `check` had an answer
        self._thinks_first = False  # whether the server's template opens the thoughts of a reply
        self.requests = self.retries = 0  # HTTP requests for messages so far; how many of them the client sent again
        self._counting = threading.Lock()
        self._latest = False, False  # of the latest reply: does its first tag close thoughts; is it cut before any tag
        # a server that sends a byte now and then is never silent: this ends it. The client waits for a Retry-After of
        # up to 60 s
        self._patience = (max_retries + 1) * (timeout + 60)
        self._client = openai.OpenAI(base_url=parts.geturl(), api_key=api_key, max_retries=max_retries,
                                     timeout=openai.Timeout(timeout, connect=min(timeout, 10)),
                                     http_client=http_client(parts, event_hooks={
                                         "request": [self._count], "response": [_at_its_word]}))

    def _count(self, request):
        if request.method == "POST":
            with self._counting:
                self.requests += 1
                self.retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    def check(self):
        """Settle the model and sample a greeting from it. UserError if the server cannot be reached or refuses."""
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
        # the first time long enough to show whether a reply begins within thoughts, where the server has room for that
        for length in (1,) if self._greeted else (256, 1):
            probe = self._sample_one([{"role": "user", "content": "Hello"}], 0, 0.0, length, None)
            self._greeted = not isinstance(probe, Exception) or isinstance(probe, NoText)
            if self._greeted:
                break
        else:
            known = f"; the server lists {', '.join(listed[:5])}" if listed and self.model not in listed else ""
            raise UserError(f"model {self.model}: {probe}{known}")
        if length > 1 and self._latest[1]:  # it may have been thoughts; they may be about what the agent must not see
            self._sample_one([{"role": "user", "content": "Hello"}], 0, 0.0, 4096, None)
            self._thinks_first |= self._latest[1]
        self._thinks_first |= self._latest[0]

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

    def _sample_one(self, messages, seed, temperature, max_new_tokens, stop):
        """A Reply or an Exception; never raises. A reply without text is asked for once more, with another seed."""
        tries = []
        for used_seed in (seed, seed_of(seed, "again")):
            outcome = queue.SimpleQueue()
            arguments = (outcome, messages, used_seed, temperature, max_new_tokens, stop)
            threading.Thread(target=self._attempt, args=arguments, daemon=True).start()
            try:
                reply = outcome.get(timeout=self._patience)
            except queue.Empty:
                return RuntimeError(f"{self.address}: no whole reply in {self._patience:.0f} s")
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
            outcome.put(type(error)(self._words(error), error.spent))
        except Exception as error:  # whatever it is, it must cost this one message and no other
            outcome.put(RuntimeError(self._words(error)))

    def _request(self, messages, seed, temperature, max_new_tokens, stop):
        """The server's response. What it may refuse is left out once that is known, and to find it out."""
        import openai
        messages = [{"role": m["role"], "content": _whole(m["content"])} for m in messages]
        settings = dict(model=self.model, temperature=temperature, max_tokens=max_new_tokens)
        if stop is not None:
            settings["stop"] = stop
        has_system = messages[0]["role"] == "system" and len(messages) > 1

        def ask(left_out):
            return self._client.chat.completions.with_raw_response.create(
                messages=_folded(messages) if has_system and "system" in left_out else messages, **settings,
                **({} if "seed" in left_out else {"seed": seed}))

        used = {"seed", "system"} if has_system else {"seed"}
        known = {name for name in used if self._takes.get(name) is False}
        try:
            response = ask(known)
            self._takes |= dict.fromkeys(used - known, True)
            return response
        except (openai.BadRequestError, openai.UnprocessableEntityError, openai.InternalServerError) as error:
            if error.status_code not in (400, 422, 500):
                raise
            refusal, words = error, f"{error}\n{error.response.text}"
        for more in ({"seed"}, {"system"}, {"seed", "system"}):
            if more <= used - known and all(self._takes.get(name) is not True and
                                            re.search(REFUSED[name][0], words, re.IGNORECASE) for name in more):
                try:
                    response = ask(known | more)
                except (openai.BadRequestError, openai.UnprocessableEntityError, openai.InternalServerError) as error:
                    refusal, words = error, f"{words}\n{error}\n{error.response.text}"
                    continue  # the words may stand in a quoted prompt
                for name in more:
                    if self._takes.get(name) is not False:
                        self._takes[name] = False
                        print(f"{self.address}: {REFUSED[name][1]}", file=sys.stderr)
                return response
        raise refusal

    def _read(self, response):
        """The Reply in a response. NoText where it says nothing, ValueError where it is something else (a web page)."""
        try:
            body = json.loads(response.text)
            choice = body["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            content, beside = message.get("content"), ""
            refusal = [one["refusal"] for one in (message, *(content if isinstance(content, list) else ()))
                       if isinstance(one, dict) and one.get("refusal")]
        except (ValueError, AttributeError, IndexError, KeyError, TypeError):
            page = response.text.lstrip()[:1] in ("<", "")
            raise ValueError("the answer is no chat completion; is this the address of an OpenAI-compatible API?"
                             + ("" if page else f" {response.text[:150]}")) from None
        for name in ("reasoning_content", "reasoning", "thinking", "thoughts", "reasoning_details"):
            beside = beside or "\n\n".join(filter(None, _parts(message.get(name))))
        usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
        read, written = (n if type(n) is int else None for n in map(usage.get, ("prompt_tokens", "completion_tokens")))
        spent = None if None in (read, written) else (read, written)
        text, thoughts = _parts(content)
        first = thinks_first(text)
        self._latest = first, reason == "length" and not beside and bool(text.strip()) and not has_tag(text)
        self._thinks_first |= thinks_first(text, alone=True)
        # cut in thoughts that the prompt had opened, it has no tag
        text, inside = clean(text, opened=self._thinks_first and (first or reason == "length"))
        thoughts = "\n\n".join(filter(None, (beside, thoughts, inside)))
        if re.search(FAILED, str(reason), re.IGNORECASE):
            raise NoText(f"a reply that broke off (finish reason: {reason})", spent)
        if not text and refusal:
            raise NoText(f"the model refuses: {refusal[0]}", spent)
        if not text and thoughts:
            raise OnlyThoughts(f"a reply without text, all of it thoughts (finish reason: {reason})", spent)
        if not text:
            calls = ", a call of a tool" * bool(message.get("tool_calls") or message.get("function_call"))
            raise NoText(f"a reply without text{calls} (finish reason: {reason})", spent)
        return Reply(text, written, thoughts, spent, reason == "length")

    def _words(self, error):
        """The error in one line, with the address and without key, password or query."""
        text = " ".join(str(error).split()) or type(error).__name__
        response = getattr(error, "response", None)
        if found := _error_in(response):
            text = f"error {found[1]}: {found[0]}"
        elif response is not None and (words := re.sub(r"<[^<>]*>", " ", response.text[:2000]).split()):
            text = f"error {response.status_code}: {' '.join(words)[:150]}"
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


def _folded(messages):
    """The dialogue with the system text in front of the first message, as colbench.lm.tokens does it for templates."""
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _parts(content):
    """(text, thoughts) of a message's content: a text, parts of it, a list of those, a number."""
    if content is None or content == "":
        return "", ""
    if isinstance(content, str):
        return content, ""
    if isinstance(content, list):
        texts, thoughts = zip(*map(_parts, content)) if content else ((), ())
        return "".join(texts), "\n".join(filter(None, thoughts))
    if not isinstance(content, dict):
        return json.dumps(content), ""
    keys = ("text", "thinking", "reasoning", "thought", "content", "value", "summary", "parts")
    key = next((key for key in keys if content.get(key) and isinstance(content[key], (str, list, dict))), None)
    text, thoughts = _parts(content.get(key))
    kind = f"{content.get('type')} {key}" + " thought" * (content.get("thought") is True)
    if re.search("think|thought|reason|summary", kind):
        return "", "\n".join(filter(None, (thoughts, text)))
    return text, thoughts


def _at_its_word(response):
    """Give a response whose body is an error the status that it names, so that the client treats it so."""
    if response.status_code == 200:
        response.read()
        if found := _error_in(response):
            response.status_code = found[1]


def _error_in(response):
    """(the server's words, HTTP status) of an error object in a response, or None."""
    try:
        body = response.json()
        choice = (body.get("choices") or [{}])[0]
        error = choice.get("error") or body.get("error")
        says = not choice.get("error") and any(_parts((choice.get("message") or {}).get("content")))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None
    if not choice and not error and "data" not in body:  # no completion, and no list of models
        names = {"message", "detail", "errors", "msg", "base_resp", "error_msg", "error_code"}
        error = body if body.keys() & names else None
    if not error or says:
        return None
    if not isinstance(error, (str, dict, list)):  # {"error": true, "message": ...}
        error = body.get("message") or body
    words = " ".join((error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)).split())
    if response.status_code != 200:
        return words, response.status_code
    for place in (error, body):
        for name in ("code", "status", "status_code", "http_code") if isinstance(place, dict) else ():
            if re.fullmatch("[45][0-9][0-9]", str(place.get(name))):
                return words, int(place[name])
    for status, pattern in ((429, "rate.?limit|too many|overload|exhausted|quota|limit reached"),
                            (401, "api.?key|authenti|authori"),
                            (503, "time.?out|timed out|unavailable|upstream|gateway|internal|server.?error")):
        if re.search(pattern, words, re.IGNORECASE):
            return words, status
    return words, 400
