"""Simulated humans: they know the hidden reference, the agent does not.

Every human has `reply(tasks, histories, seeds) -> list[str | Exception]`:
    tasks      B dicts with "problem_description" and "ground_truth" (the hidden reference)
    histories  B dialogues so far, [{"role": "user" | "assistant", "content"}, …], the agent's message last
    seeds      B ints
and counts `replies` given and `leaks`, those of them whose first draft held code of the reference; `leaked` says which of
the latest B replies these were.
"""
import ast
import io
import re
import tokenize
from collections import namedtuple
from functools import lru_cache

from colbench.files import UserError, seed_of
from colbench.server import ServerChat, shown

UNKNOWN = "I don't know."

HUMAN_PROMPT = """\
You play a person who is chatting with a programming assistant. You asked it for this:

{problem_description}

What you have in mind is exactly what the code below does. The assistant cannot see this code and must never see it.

{hidden_information}

When the assistant asks something, look the answer up in the code and say it in plain words, the way a customer would. \
If the code does not settle the question, say that you don't know. Tell nothing that was not asked, and write no code.

The conversation so far (you are the Human):

{dialogue_history}

Reply to the Agent's last message as the Human, in one or two short sentences, and write nothing but the reply."""


def make_human(spec, chat=None, model=None, max_characters=400):
    """The human for `spec`: "scripted", "self" (plays on `chat`, the local model), or the address of a server.

    model: the name of the server's model, None for its first. UserError: another spec, or a server that cannot be used.
    """
    if spec == "scripted":
        return ScriptedHuman()
    if spec == "self":
        if chat is None:
            raise UserError("human self: there is no local model that could play it")
        return ModelHuman(chat, max_characters)
    if spec.startswith(("http://", "https://")):
        server = ServerChat(spec, model)
        server.check()
        return ModelHuman(server, max_characters)
    raise UserError(f"human {shown(spec)}: scripted, self or the address of a server (http://…) is wanted")


class ModelHuman:
    """A chat model plays the human. `chat` is anything with `sample`: ServerChat, or the local model.

    Replies are drawn at temperature 0 and cut at `max_characters` (400 in the released environment). One that leaks
    (see `leaks`) is drawn again once at temperature 1; if that leaks too, it is cut there; `cuts` counts these.
    `prompt` may hold {problem_description}, {hidden_information} and {dialogue_history}.
    """

    def __init__(self, chat, max_characters=400, prompt=HUMAN_PROMPT):
        self.chat, self.max_characters, self.prompt = chat, max_characters, prompt
        self.repeatable = getattr(chat, "repeatable", False)
        self.replies = self.leaks = self.cuts = 0

    def reply(self, tasks, histories, seeds):
        """See the top of the file. A request that failed has its Exception in its place."""
        prompts = [[{"role": "user", "content": self._prompt(*pair)}] for pair in zip(tasks, histories)]
        references = [task["ground_truth"] for task in tasks]
        drafts = self._draw(prompts, seeds, temperature=0.0)
        leaking = [isinstance(draft, str) and leaks(draft, code) for draft, code in zip(drafts, references)]
        again = [i for i, draft in enumerate(drafts) if leaking[i] or draft == ""]
        if again:
            other_seeds = [seed_of(seeds[i], "again") for i in again]
            second = self._draw([prompts[i] for i in again], other_seeds, temperature=1.0)
            for i, draft in zip(again, second):
                if isinstance(draft, str) and draft:  # else the first draft is the best there is
                    drafts[i] = draft
                if leaks(drafts[i], references[i]):
                    self.cuts += 1
                    drafts[i] = cut_leak(drafts[i], references[i])
                drafts[i] = drafts[i] or UNKNOWN
        self.leaked = leaking
        self.leaks += sum(leaking)
        self.replies += sum(isinstance(draft, str) for draft in drafts)
        return drafts

    def _prompt(self, task, history):
        names = {"user": "Human", "assistant": "Agent"}
        dialogue = "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in history)
        return self.prompt.format(problem_description=task["problem_description"],
                                  hidden_information=task["ground_truth"], dialogue_history=dialogue)

    def _draw(self, prompts, seeds, temperature):
        # English has about four characters a token: half the characters as tokens is ample
        rows = self.chat.sample(prompts, [[seed] for seed in seeds], temperature=temperature,
                                max_new_tokens=max(16, self.max_characters // 2))
        return [row[0] if isinstance(row[0], Exception) else self._clean(row[0].text) for row in rows]

    def _clean(self, text):
        return re.sub(r"^\W*human\W*:\s*", "", text.strip(), flags=re.IGNORECASE)[:self.max_characters].strip()


# ---- what counts as leaked code -------------------------------------------------------------------------------------

RUN = 32   # characters without blanks (about 40 with them) of verbatim code that are a leak
LINE = 15  # the same for a whole line (about 20 with blanks)
OUTSIDE = 10  # that many of them outside string constants: quoting a text of the reference is an answer, not a leak

Code = namedtuple("Code", "headers runs lines")


def leaks(reply, reference):
    """Whether `reply` holds code of the reference. Blanks, line ends and case do not matter. Any of these is a leak:

    - the header `def name(` of one of its functions,
    - RUN characters in a row of its code, OUTSIDE of them outside string constants,
    - a whole code line of LINE characters or more, OUTSIDE of them outside string constants, with an operator.
    Comments, docstrings, string constants, numbers, names and a plain `name = 0.15` are answers. Code retold in other
    names is not seen. A reference that is no Python (a page) is taken as code from end to end.
    """
    return _leak_at(reply, reference) is not None


def cut_leak(reply, reference):
    """`reply` up to its first leak, without the fence or quote that opens the code. May be ""."""
    start = _leak_at(reply, reference)
    if start is None:
        return reply
    return re.sub(r"```\w*\s*$", "", reply[:start]).rstrip("`\"'(: \n").strip()


def _leak_at(reply, reference):
    """Index in `reply` where the first leak starts, or None."""
    code = _code(reference)
    kept = [(i, low) for i, character in enumerate(reply) for low in character.lower() if not low.isspace()]
    places, squeezed = [i for i, _ in kept], "".join(low for _, low in kept)
    starts = [found.start() for header in code.headers if (found := header.search(reply))]
    for line in code.lines:
        at = squeezed.find(line)
        if at >= 0:
            starts.append(places[at])
    for at in range(len(squeezed) - RUN + 1):
        if squeezed[at:at + RUN] in code.runs:
            starts.append(places[at])
            break
    return min(starts, default=None)


@lru_cache(maxsize=256)  # each holds some 100 kB
def _code(reference):
    """The reference without blanks and comments: header patterns, all its runs of RUN characters, its long lines."""
    pieces = {}  # row -> [(text without blanks, is it a string constant)]
    for token in _tokens(reference) or ():
        text = "".join(token.string.split()).lower()
        if text and token.type != tokenize.COMMENT:
            pieces.setdefault(token.start[0], []).append((text, token.type in STRINGS))
    if not pieces:
        pieces = {row: [("".join(line.split()).lower(), False)] for row, line in enumerate(reference.splitlines())}
    lines, whole, outside = set(), "", []
    for row in sorted(pieces):
        line = "".join(text for text, _ in pieces[row])
        code = "".join(text for text, is_string in pieces[row] if not is_string)
        plain = re.fullmatch(r"\w+=[-+]?[\w.]*", code)  # one constant or name
        if len(line) >= LINE and len(code) >= OUTSIDE and re.search(r"[-+*/%<>=(\[{&|^~]", code) and not plain:
            lines.add(line)
        whole += line
        for text, is_string in pieces[row]:
            outside += [not is_string] * len(text)
    runs = {whole[i:i + RUN] for i in range(len(whole) - RUN + 1) if sum(outside[i:i + RUN]) >= OUTSIDE}
    names = re.findall(r"\bdef\s+(\w+)\s*\(", reference)
    headers = [re.compile(rf"\bdef\s+{name}\s*\(", re.IGNORECASE) for name in names]
    return Code(headers, runs, lines)


STRINGS = {value for name, value in vars(tokenize).items()
           if name in ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")}  # f-strings: Python 3.12 and later


def _tokens(reference):
    """Its Python tokens, or None if it is no Python."""
    try:
        return list(tokenize.generate_tokens(io.StringIO(reference).readline))
    except (tokenize.TokenError, SyntaxError):
        return None


# ---- the scripted human ---------------------------------------------------------------------------------------------

Detail = namedtuple("Detail", "keywords sentence")  # what a question about it mentions; the whole truth about it

STOP_WORDS = frozenset("""
a about all also am an and any are as at be been before but by can cannot could did do does doing each else ever every
exact exactly for from function get give had has have help her here his how i if in include into is it its itself just
know let like look make may me mean might more most must my need no not of off on once one only or other our out over
own please question return same say set shall she should sir so some such take tell than thank that the their them then
there these they thing this those to too under until up us use used using very want was way we well were what when where
which while who whom why will with within without would write yes you your
""".split())
# nouns that say only that a quantity is meant: they count as keywords where a detail has no other
WEAK_WORDS = frozenset("""
amount calculate code compute cost count detail fee figure level number price quantity rate result rule size total value
""".split())


class ScriptedHuman:
    """Offline and deterministic: answers a question about a detail of the reference with one true short sentence.

    Details are the reference's comments, its constants in CAPITALS and the defaults of its arguments. One detail a
    message: the one whose keywords the agent's question covers best, among equals the one mentioned first. Of a list of
    three or more things only the first is heard: reading out all the things there could be finds nothing out sooner.
    """

    repeatable = True

    def __init__(self):
        self.replies = self.leaks = self.cuts = 0

    def reply(self, tasks, histories, seeds):
        """See the top of the file; seeds are not needed."""
        self.replies += len(tasks)
        self.leaked = [False] * len(tasks)
        return [answer(task["ground_truth"], history[-1]["content"]) for task, history in zip(tasks, histories)]


def answer(reference, message):
    """The scripted human's reply to the agent's message."""
    places = {}  # keyword -> where the message first mentions it
    for place, word in enumerate(keywords(_heard(message))):
        places.setdefault(word, place)
    best, best_key = UNKNOWN, (0, 0)
    for detail in details(reference):
        hits = [places[word] for word in detail.keywords if word in places]
        # one word in passing is no question about a long comment
        if hits and (len(hits) >= 2 or 2 * len(hits) >= len(detail.keywords)):
            key = (len(hits) ** 2 / len(detail.keywords), -min(hits))
            if best is UNKNOWN or key > best_key:
                best, best_key = detail.sentence, key
    return best


def _heard(message):
    """The part of the message that is listened to: its questions if any, and of three or more things the first."""
    questions = [sentence for sentence in re.split(r"(?<=[.?!])\s+|\n", message) if "?" in sentence]
    heard = " ".join(questions) or message
    things = [thing for thing in re.split(r"[,;?!\n]|\b(?:and|or)\b", heard) if keywords(thing)]
    return things[0] if len(things) >= 3 else heard


def keywords(text):
    """Its content words in order: lower case, plurals folded, stop words and single letters left out."""
    words = (word.lower() for word in re.findall(r"[^\W\d_]+", text))
    return [_singular(word) for word in words if len(word) > 1 and word not in STOP_WORDS]


def _singular(word):
    if len(word) < 4 or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    return word.removesuffix("s")


@lru_cache(maxsize=20_000)
def details(reference):
    """The details of a reference that a question can be about, in the order of its lines: a tuple of Detail."""
    found = sorted([*_comments(reference), *_constants(reference)], key=lambda detail: detail[0])  # by row
    result = []
    for _, words, sentence in found:
        words = frozenset(keywords(words))
        words = words - WEAK_WORDS or words
        if words and not leaks(sentence, reference):
            result.append(Detail(words, sentence))
    return tuple(result)


def _comments(reference):
    """(row, words, sentence) per comment; full-line comments on consecutive rows are one."""
    numbers, code_rows, comments, before = {}, set(), [], ["", ""]
    for token in _tokens(reference) or ():
        row = token.start[0]
        if token.type == tokenize.COMMENT:
            comments.append((row, token.string.lstrip("#!: ").strip()))
            continue
        if token.string.strip():
            code_rows.add(row)
        if token.type == tokenize.NUMBER:
            minus = before[1] == "-" and not re.match(r"[\w)\]}]", before[0])  # a sign, not a subtraction
            numbers.setdefault(row, "-" * minus + token.string)
        before = [before[1], token.string]
    merged, last = [], None
    for row, text in comments:
        full_line = row not in code_rows
        if full_line and last == row - 1 and merged:
            text = f"{merged.pop()[1]} {text}"
        last = row if full_line else None
        merged.append((row, text, full_line))
    for row, text, full_line in merged:
        text = " ".join(text.split())
        if re.search(r"\w\(|[=\[\]{};]|\b(def|import|print|lambda)\b", text):  # code that was commented out
            continue
        noun = re.sub(r"^(the|an?)\s+", "", text.rstrip(".:"), flags=re.IGNORECASE)
        if not full_line and row in numbers and 0 < len(noun.split()) <= 4:
            yield row, noun, f"The {noun} is {numbers[row]}."
        elif text:
            yield row, text, text[0].upper() + text[1:].rstrip(".:,") + "."


def _constants(reference):
    """(row, words, sentence) per constant in CAPITALS and per default argument: numbers and short texts."""
    try:
        tree = ast.parse(reference)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            pairs = [(name, node.value) for name in names if name.isupper()]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            plain = node.args.posonlyargs + node.args.args
            pairs = [(arg.arg, value) for arg, value in zip(plain[::-1], node.args.defaults[::-1])]
            pairs += [(arg.arg, value) for arg, value in zip(node.args.kwonlyargs, node.args.kw_defaults)]
        for name, value in pairs:
            try:
                value = ast.literal_eval(value)
            except (ValueError, TypeError):  # an expression, or no value at all
                continue
            if isinstance(value, (int, float)) or isinstance(value, str) and 0 < len(value) <= 80 and "\n" not in value:
                words = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)).lower()
                yield node.lineno, words, f"The {words} is {value}."
