"""Finds the page in an agent's message, as the released environment does; the agent's prompts."""
import re

from colbench.env.frontend.pages import edits, expand

PAGE_PROMPT = (
    "You design a web page for a person who has a certain page in mind and knows it only by sight. "
    "In each message, show one whole page, from <html> to </html>, styled with Tailwind CSS 2.2.19 "
    '(<link href="https://cdn.jsdelivr.net/npm/tailwindcss@2.2.19/dist/tailwind.min.css" '
    'rel="stylesheet">), with real texts. For pictures use only https://picsum.photos/id/48/W/H, '
    "where W and H are width and height. The person sees your page as a picture, not your words, "
    "and says how it differs from theirs; bring it closer each time: layout, menu, colours, sizes, "
    "pictures. You have {max_turns} messages in all. First think, then write \"OUTPUT:\" and "
    "behind it the page. In your last message, when the page is as they want it, begin the part "
    "behind \"OUTPUT:\" with \"I WANT TO ANSWER:\"."
)
EDITS_PROMPT = "Change the page until the person likes it, then answer."


def rewrite_urls(text: str) -> str:
    """Rewrite picture addresses as the released code does.

    A random Unsplash picture with a one-word query and `picsum.photos/W/H` become picture 48. Its
    quirks stay: it keeps a second query word and misses some addresses.
    """
    unsplash = r"https://source\.unsplash\.com/random/(\d+)x(\d+)/\?[\w=]+"
    text = re.sub(unsplash, r"https://picsum.photos/id/48/\1/\2", text)
    return re.sub(r"https://picsum\.photos/(\d+)/(\d+)", r"https://picsum.photos/id/48/\1/\2", text)


def extract(message: str, rule: str = "published") -> str | None:
    """The page in a message, or None.

    published: the first lower-case `<html…</html>`, else the first `<body…</body>`. A doctype is
    dropped, so pages run in quirks mode. A page without its end tag does not count.
    tolerant: the last page in any case, even if cut off or beginning with its head or body.
    """
    message = rewrite_urls(message)
    if rule == "published":
        found = (re.search(r"<html.*?>.*?</html>", message, re.DOTALL)
                 or re.search(r"<body.*?>.*?</body>", message, re.DOTALL))
        return found.group() if found else None
    for name in ("html", "head", "body"):
        starts = [found.start() for found in re.finditer(rf"<{name}[\s>]", message, re.IGNORECASE)]
        if starts:
            page = message[starts[-1]:]
            closing = "html" if name == "html" else "body"
            ends = list(re.finditer(rf"</{closing}\s*>", page, re.IGNORECASE))
            return page[:ends[-1].end()] if ends else page.split("```")[0]
    return None


def page_shown(history: list[dict], language: str = "html", rule: str = "published") -> str | None:
    """The page in the agent's last message, or None: then the human sees nothing."""
    if language == "edits":
        return expand(history) if edits(history[-1]["content"]) else None
    return extract(history[-1]["content"], rule)


def final_page(history: list[dict], language: str = "html", rule: str = "published") -> str | None:
    """The answer of an episode: the last page the agent showed, or None if it never did.

    If the answering message has no page, the page before it counts, as in the released environment.
    """
    if language == "edits":
        return expand(history)
    pages = (extract(message["content"], rule)
             for message in reversed(history) if message["role"] == "assistant")
    return next((page for page in pages if page is not None), None)
