"""The readable text of an HTML page, parsed by selectolax (Lexbor)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nha.data.packages import check_package

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


BLOCKS = _names(
    "address article aside blockquote br dd div dl dt figcaption figure footer h1 h2 h3 h4 h5 h6 header hr li main nav "
    "ol p pre section table tr ul"
)
PARAGRAPHS = _names("p pre table ul ol dl h1 h2 h3 h4 h5 h6 header hr")  # an empty line follows these
SKIPPED = _names("script style nav header footer head template noscript svg button")


def plain_text(page: str) -> str:
    """The readable text of an HTML page: its main part if it marks one, without scripts, styles or navigation.

    Raises ImportError without selectolax.

    >>> plain_text("<nav>Home</nav><main><h1>Title</h1><p>One &amp; <b>two</b></p><pre>a\\n  b</pre></main>")
    'Title\\n\\nOne & two\\n\\na\\n  b'
    """
    check_package("selectolax", "data", "to read HTML")
    from selectolax.lexbor import LexborHTMLParser

    root = LexborHTMLParser(page).body
    if root is None:
        return ""
    main = root.css_first("main, [role=main]")
    text = "" if main is None else "".join(_texts(main))
    text = text if text.strip() else "".join(_texts(root))
    text = re.sub(r"\n (?=\S)", "\n", re.sub(r"[ \t]+\n", "\n", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _texts(root: LexborNode) -> list[str]:
    """Texts under an element in document order, with newlines around blocks."""
    found: list[str] = []
    # A stack, since pages nest deeper than Python calls: (node or text, preformatted).
    stack: list[tuple[LexborNode | str, bool]] = [(root, False)]
    while stack:
        item, preformatted = stack.pop()
        if isinstance(item, str):
            found.append(item)
            continue
        tag = item.tag or ""
        if tag == "-text":
            text = item.text_content or ""
            found.append(text if preformatted else re.sub(r"\s+", " ", text))
            continue
        if tag in SKIPPED or tag.startswith("-") or "headerlink" in (item.attributes.get("class") or ""):
            continue
        if tag in BLOCKS:
            found.append("\n")
            if tag != "br":
                stack.append(("\n\n" if tag in PARAGRAPHS else "\n", True))
        children: list[tuple[LexborNode | str, bool]] = []
        child = item.child
        while child is not None:
            children.append((child, preformatted or tag == "pre"))
            child = child.next
        stack.extend(reversed(children))
    return found
