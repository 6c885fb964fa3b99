"""What of a page's own scripts runs: the settings of Tailwind's script, and nothing else.

A page's scripts are hostile, so none runs as it stands. Each is read here and written anew from the parts that were
understood; the browser's policy lets exactly these texts run:

    // our colours
    window.tailwind.config = {theme: {colors: {brand: "#f00"}, width: () => all()}}; track()

    window["tailwind"]["config"] = {theme: {colors: {brand: "#f00"}}};

Understood are literals, variables made of them, assignments to `tailwind` and to such variables in any spelling, and
around them blocks, `if (window.tailwind)`, `try`, a function called at once or when the page is loaded. Of a literal
the entries that are something else (functions, plugins, calls) are left out. No function, no call but Object.assign,
Object.freeze and the listener for the loaded page, and no name of the browser's gets into the new text: `tailwind`
stays, other variables get a prefix.
"""
import base64
import hashlib
import html
import json
import re

TOKEN = re.compile(r"""
    (?P<blank> (?:\A|\n)[ \t\n]*-->[^\n]* | [\s\ufeff] | //[^\n\u2028\u2029]* | <!--[^\n]* | /\*.*?\*/ )
  | (?P<text> '(?:[^'\\\n]|\\.)*' | "(?:[^"\\\n]|\\.)*" | `(?:[^`\\]|\\.)*` )
  | (?P<number> 0[xob][\da-f_]+ | (?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d+)? )
  | (?P<name> (?:[^\W\d]|\$)[\w$]* )
  | (?P<regex> /(?:[^/\\\[\n]|\\.|\[(?:[^\]\\\n]|\\.)*\])+/[a-z]* )
  | (?P<mark> \.\.\.|=>|\?\?=|\|\|=|\?\.|\?\?|\|\||&&|[=!]==?|\+\+|--|. )""", re.VERBOSE | re.DOTALL | re.IGNORECASE)
WINDOW = ("window", "self", "globalThis", "this", "top")
CONSTANTS = ("true", "false", "null", "undefined", "NaN", "Infinity")
OPERATORS = ("=", "||=", "??=", "||", "&&", "??", "+", "-", "*", "/")
COMPOUND = ("if", "else", "for", "while", "do", "with", "switch", "try", "catch", "finally", "function", "class",
            "async", "export")
CONDITION = (r"if\((!*(?:typeof)?(?:(?:window|self|globalThis)\.)?tailwind(?:\.config)?"
             r"(?:!==?(?:undefined|null|(['\"])undefined\2))?)\)")
FUNCTION = r"(?:async)?(?:function[\w$]*\([\w$]*\)|\([\w$]*\)=>|[\w$]+=>)\{"
AT_ONCE = rf"[(!]+{FUNCTION}"
LATER = rf"(?:(document|window)\.)?(?:addEventListener\((['\"])(DOMContentLoaded|load)\2,|onload=){FUNCTION}"


class Other(Exception):
    """Here stands something that is not configuration."""


def configured(page: str) -> tuple[str, list]:
    """(the page with only configuration in its scripts, what a Content-Security-Policy lets run of them).

    A script without any stays as it is: the policy does not know it.
    """
    sources, unread = [], {"document", "location", "navigator", "localStorage", "Math"}

    def read(text):
        text = settings(text, unread)
        if text:
            digest = base64.b64encode(hashlib.sha256(text.encode("utf-8", "replace")).digest()).decode()
            sources.append(f"'sha256-{digest}'")
        return text

    def attribute(found):
        text = read(html.unescape(found[2][1:-1]))
        return f'{found[1]}"{html.escape(text)}"' if text else found[0]

    page = re.sub(r"(<(?:script|body)\b[^>]*?\sonload\s*=\s*)(\"[^\"]*\"|'[^']*')", attribute, page,
                  flags=re.IGNORECASE)
    page = re.sub(r"(<script\b(?:\"[^\"]*\"|'[^']*'|[^\"'>])*>)(.*?)(?=</script[\s/>])",
                  lambda found: found[1] + (read(found[2]) or found[2]), page, flags=re.IGNORECASE | re.DOTALL)
    return page, sources


def settings(script: str, unread: set) -> str:
    """The configuration in a script as new text, "" where there is none. unread: variables whose value is not known."""
    try:
        return "" if "\0" in script else _Reader(script, unread).statements()
    except RecursionError:
        return ""


class _Reader:
    """Reads a script from left to right; each method returns new text for what it has read, or raises Other."""

    def __init__(self, script, unread):
        self.tokens, self.at, self.unread, line = [], 0, unread, False  # (kind, text, whether on a new line)
        script, position, before = re.sub(r"\r\n?", "\n", script), 0, ""
        while found := TOKEN.match(script, position):
            kind, text, position = found.lastgroup, found[0], found.end()
            if kind == "regex" and (re.match(r"[\w$)\]}'\"`]", before) and before != "return"):
                kind, text, position = "mark", "/", found.start() + 1  # a division
            if kind == "blank":
                line |= "\n" in text
            else:
                self.tokens.append((kind, text, line))
                before, line = text, False
        self.tokens.append(("end", "", True))

    # ---- tokens

    @property
    def kind(self):
        return self.tokens[self.at][0]

    @property
    def next(self):
        return self.tokens[self.at][1]

    def take(self, *wanted):
        """The next token if it is one of these (texts), else ""."""
        if self.next not in wanted:
            return ""
        self.at += 1
        return self.tokens[self.at - 1][1]

    def need(self, *wanted, kinds=()):
        """The next token, which must be one of these or of these kinds."""
        if self.kind == "end" or self.next not in wanted and self.kind not in kinds:
            raise Other
        self.at += 1
        return self.tokens[self.at - 1][1]

    def head(self, pattern):
        """Take the tokens that `pattern` matches when they are written without blanks."""
        found = re.match(pattern, "".join(text for _, text, _ in self.tokens[self.at:self.at + 20]))
        length = found.end() if found else 0
        while length > 0:
            length -= len(self.next)
            self.at += 1
        return found

    def starts(self):
        """Whether a statement can start at the next token, where a new line begins."""
        return self.tokens[self.at][2] and (self.kind in ("name", "text", "end") or self.next in ("{", "}", "!", ";"))

    # ---- statements

    def statements(self, inside=False):
        """Up to the end, or to the bracket that closes a block. What is not configuration is left out."""
        kept = []
        while self.kind != "end" and not (inside and self.next == "}"):
            start = self.at
            try:
                kept.append(self.statement())
            except Other:
                self.at = start
                self.skip()
                self.at += self.at == start
        self.at += inside and self.next == "}"
        return "\n".join(filter(None, kept))

    def skip(self):
        """Past one statement of any kind."""
        depth, compound = 0, self.next in COMPOUND
        if self.next in ("const", "let", "var", "function"):
            self.unread.add(self.tokens[self.at + 1][1])
        while self.kind != "end" and not (depth == 0 and self.next == "}"):
            kind, token, _ = self.tokens[self.at]
            self.at += 1
            depth = max(depth + (token in ("(", "[", "{")) - (token in (")", "]", "}")), 0)
            whole = token == "}" if compound else self.starts() and (kind != "mark" or token in (")", "]", "}"))
            if depth == 0 and (token == ";" or whole):
                break

    def statement(self):
        """One of configuration."""
        if self.take(";"):
            return ""
        if self.take("{"):
            return f"{{ {self.statements(True)} }}"
        if self.head(r"try\{"):
            return f"try {{ {self.statements(True)} }} catch {{}}"
        if found := self.head(CONDITION):
            return f"if ({found[1].replace('typeof', 'typeof ')}) {self.statement()}"
        if self.head(AT_ONCE):
            body = self.statements(True)
            if not self.head(r"\)?\("):
                raise Other  # nobody calls it
            self.skip()
            return f"{{ {body} }}"
        if found := self.head(LATER):
            body = self.statements(True)
            self.skip()
            return f'{found[1] or "window"}.addEventListener("{found[3] or "load"}", () => {{ {body} }});'
        kind = self.take("const", "let", "var")
        text = self.declared() if kind else self.value()
        while kind and self.take(","):
            text += f", {self.declared()}"
        if not (self.take(";") or self.next == "}" or self.starts()):
            raise Other
        return f"{kind} {text};".strip()

    def declared(self):
        """`name`, `name = value` or `{name, name: other} = value`."""
        if self.take("{"):
            pairs = []
            while not self.take("}"):
                key = self.allowed(self.need(kinds=["name"]))
                pairs.append(f"{key}: {_own(self.need(kinds=['name']) if self.take(':') else key)}")
                self.take(",")
            text = f"{{{', '.join(pairs)}}}"
        else:
            text = _own(self.need(kinds=["name"]))
        return f"{text} = {self.value()}" if self.take("=") else text

    # ---- values

    def value(self):
        """A literal, a variable, or several with operators between them, `=` among these."""
        text = self.operand()
        while operator := self.take(*OPERATORS):
            text += f" {operator} {self.operand()}"
        return text

    def operand(self):
        if sign := self.take("-", "+", "!"):
            return f"{sign} {self.operand()}"
        if self.take("("):
            text = f"({self.value()})"
            self.need(")")
            return text
        if self.take("["):
            return f"[{self.entries(self.element, ']')}]"
        if self.take("{"):
            return f"{{{self.entries(self.property, '}')}}}"
        if found := self.head(r"Object\.(assign|freeze)\("):
            return f"Object.{found[1]}({self.entries(self.element, ')')})"
        if self.kind == "name":
            return self.path()
        text = self.need(kinds=["text", "number", "regex"])
        if text[0] == "`" and "${" in text:
            raise Other
        return text

    def entries(self, entry, closing):
        """Those of an array, an object or a call up to its closing bracket, without those that are something else."""
        kept = []
        while not self.take(closing):
            start = self.at
            try:
                if not self.take(","):
                    text = entry()
                    if self.next not in (",", closing):
                        raise Other
                    kept.append(text)
            except Other:
                self.at, depth = start, 0
                while depth > 0 or self.next not in (",", ")", "]", "}"):
                    depth += (self.next in ("(", "[", "{")) - (self.next in (")", "]", "}"))
                    self.need(self.next)
                words = {text for _, text, _ in self.tokens[start:self.at]}
                # a browser has no `require`: there the whole statement fails
                if self.next not in (",", closing) or "require" in words and not words & {"function", "=>"}:
                    raise
        return ", ".join(kept)

    def element(self):
        return self.take("...") + self.value()

    def property(self):
        """`...value`, `key: value`, `[key]: value` or the name of a variable."""
        if self.take("..."):
            return f"...{self.value()}"
        if self.take("["):
            key = f"[{self.need(kinds=['number', 'text'])}]"
            self.need("]")
            if "${" in key:
                raise Other
        elif self.kind == "name" and self.tokens[self.at + 1][1] in (",", "}"):
            return f"{self.next}: {self.path()}"
        else:
            key = self.need(kinds=["name", "text", "number"])
        self.need(":")
        return f"{key}: {self.value()}"

    def path(self):
        """A constant, or a variable and what is in it: `tailwind.config`, `window["tailwind"]`, `palette.blue`."""
        text = name = self.need(kinds=["name"])
        if name in CONSTANTS:
            return name
        if name in self.unread:
            raise Other
        inside = name in WINDOW and self.next in (".", "?.", "[")  # then the next name is the variable
        if not inside:
            text = _own(name)
        while mark := self.take(".", "?.", "["):
            if mark == "[":
                name = self.need(kinds=["text", "number"]).strip("'\"`")
                self.need("]")
            else:
                name = self.need(kinds=["name"])
            text += "?." * (mark == "?.") + f"[{json.dumps(_own(name) if inside else self.allowed(name))}]"
            inside = False
        return text

    def allowed(self, name):
        """A name within a variable; those that lead to functions are not."""
        if name in ("constructor", "prototype", "__proto__") or "\\" in name:
            raise Other
        return name


def _own(name: str) -> str:
    """What a variable is called in the new text, so that it is none of the browser's."""
    return name if name == "tailwind" else f"own_{name}"
