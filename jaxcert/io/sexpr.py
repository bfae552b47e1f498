"""S-expressions that know where they stand, so that every complaint can point at its text."""

import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn, TypeAlias

from jaxcert.errors import VnnlibError

MAX_DEPTH = 200
"""How deep forms may nest: what walks them is recursive, and Python's stack is finite."""

_TOKEN = re.compile(r"[()]|[^\s();]+|;[^\n]*")


class Atom(NamedTuple):
    """A word: a symbol or a number, and its offset in the text."""

    text: str
    at: int


class Form(NamedTuple):
    """A pair of parentheses with what they hold, and the offset of the opening one."""

    items: "list[Node]"
    at: int


Node: TypeAlias = Atom | Form


class Source:
    """A text and its name, for errors that read `name:line:column: message` and show the line."""

    def __init__(self, name: str, text: str):
        self.name = name
        self.text = text.replace("\r\n", "\n").replace("\r", "\n")

    def fail(self, at: int, message: str) -> NoReturn:
        """Raise a `VnnlibError` that points at an offset of the text."""
        raise VnnlibError(f"{self.place(at)}: {message}{self._picture(at)}")

    def wrong(self, at: int, found: str, expected: str) -> NoReturn:
        """Raise a `VnnlibError` that says what stands at an offset and what should."""
        self.fail(at, f"found {found}; expected {expected}")

    def application(self, node: "Node", expected: str) -> "tuple[str, list[Node]]":
        """The operator and the arguments of a form; anything else is an error."""
        if isinstance(node, Form) and node.items and isinstance(node.items[0], Atom):
            return node.items[0].text, node.items[1:]
        self.wrong(node.at, show(node), expected)

    def place(self, at: int) -> str:
        """The offset as `name:line:column`, both counted from 1."""
        column = at - self.text.rfind("\n", 0, at)
        return f"{self.name}:{self.line(at)}:{column}"

    def line(self, at: int) -> int:
        """The number of the line that holds an offset, counted from 1."""
        return self.text.count("\n", 0, at) + 1

    def line_start(self, line: int) -> int:
        """The offset at which a line, counted from 1, starts."""
        at = 0
        for _ in range(line - 1):
            at = self.text.find("\n", at) + 1
        return at

    def _picture(self, at: int) -> str:
        """The offending line, of a long one the part around the offset, above a caret."""
        start = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        end = end if end >= 0 else len(self.text)
        if end - start > 100:
            start, end = max(start, at - 60), min(end, at + 40)
        line = self.text[start:end].replace("\t", " ")
        return f"\n    {line}\n    {' ' * (at - start)}^"


def read(source: Source) -> Iterator[Form]:
    """The forms of a text, one by one; comments run from `;` to the end of the line.

    >>> form, = read(Source("example", "(assert (<= X_0 1)) ; the end"))
    >>> show(form.items[1]), form.items[1].at
    ('(<= ...)', 8)

    Raises:
      VnnlibError: at a parenthesis without its partner, at a word outside of any form, or where
        forms nest deeper than `MAX_DEPTH`.
    """
    unclosed: list[Form] = []
    for token in _TOKEN.finditer(source.text):
        text, at = token.group(), token.start()
        if text == "(":
            unclosed.append(Form([], at))
            if len(unclosed) > MAX_DEPTH:
                source.wrong(at, "one more '('", f"at most {MAX_DEPTH} levels of nesting")
        elif text == ")":
            if not unclosed:
                source.wrong(at, "')' without its '('", "a command or the end of the file")
            form = unclosed.pop()
            if unclosed:
                unclosed[-1].items.append(form)
            else:
                yield form
        elif text[0] != ";":
            if not unclosed:
                source.wrong(at, f"{text[:40]} outside of any form", "'('")
            unclosed[-1].items.append(Atom(text, at))
    if unclosed:
        source.wrong(unclosed[0].at, "'(' that is never closed", "its ')'")


def show(node: Node) -> str:
    """A node in a few words, for error messages.

    >>> show(Form([Atom("<=", 1), Atom("X_0", 4)], 0))
    '(<= ...)'
    """
    if isinstance(node, Atom):
        return node.text if len(node.text) <= 40 else node.text[:37] + "..."
    if not node.items:
        return "()"
    return f"({show(node.items[0])} ...)" if len(node.items) > 1 else f"({show(node.items[0])})"
