"""A SQL-like condition over named columns, parsed once and evaluated over whole record batches.

Words in any case: comparisons (``= != <> < <= > >=``), AND, OR, NOT, [NOT] IN, [NOT] LIKE and ILIKE, IS [NOT] NULL,
[NOT] BETWEEN, ``+ - * /``, the functions of `FUNCTIONS`, TRUE, FALSE, numbers, 'strings' and "quoted names". As in SQL
a null makes a comparison unknown, AND and OR know what an unknown can't change, and NaN counts as null. Nothing else of
Python or SQL can be reached from the text.
"""

# pyarrow.compute makes its functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["number", "string", "boolean"]
Columns = Mapping[str, Kind]
"""Lower-case name -> what the column holds."""
_MAX_CHARS = 10_000
_MAX_DEPTH = 64

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<string>'(?:[^']|'')*')
      | (?P<quoted>"(?:[^"]|"")+")
      | (?P<word>[A-Za-z_][A-Za-z_0-9]*)
      | (?P<sign><=|>=|<>|!=|==|[-+*/=<>(),])
    )""",
    re.VERBOSE,
)
_KEYWORDS = frozenset({"AND", "OR", "NOT", "IN", "LIKE", "ILIKE", "IS", "NULL", "BETWEEN", "TRUE", "FALSE"})
_COMPARISONS = {
    "=": "equal", "==": "equal", "!=": "not_equal", "<>": "not_equal", "<": "less", "<=": "less_equal",
    ">": "greater", ">=": "greater_equal",
}  # fmt: skip
_ARITHMETIC = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}

# Function -> kinds of its arguments, kind of its value.
FUNCTIONS: Mapping[str, tuple[tuple[Kind, ...], Kind]] = {
    "length": (("string",), "number"),
    "lower": (("string",), "string"),
    "upper": (("string",), "string"),
    "abs": (("number",), "number"),
    "least": (("number", "number"), "number"),
    "greatest": (("number", "number"), "number"),
}


@dataclass(frozen=True)
class _Token:
    sort: str
    text: str
    position: int


@dataclass(frozen=True)
class _Node:
    """`kind` says what the node is; `position` (from 1) stands in messages."""

    kind: str
    position: int
    value: Any = None
    parts: "tuple[_Node, ...]" = ()


class ExpressionError(ThroughlineError):
    """What is wrong with a condition, and where."""


def _fail(position: int, message: str) -> ExpressionError:
    return ExpressionError(f"where, position {position}: {message}")


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            at = position + len(text[position:]) - len(text[position:].lstrip())
            raise _fail(
                at + 1, f"{text[at]!r} has no meaning here; a condition looks like aesthetic > 5 AND width >= 512"
            )
        sort = match.lastgroup
        found = match.group(sort)
        if sort == "word" and found.upper() in _KEYWORDS:
            sort, found = "keyword", found.upper()
        yield _Token(sort, found, match.start(match.lastgroup) + 1)
        position = match.end()
    yield _Token("end", "the end", len(text) + 1)


class _Parser:
    """Recursive descent, loosest operator first."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._index = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._either()
        if self._next.sort != "end":
            raise self._unexpected("AND, OR or the end")
        return node

    @property
    def _next(self) -> _Token:
        return self._tokens[self._index]

    def _unexpected(self, expected: str) -> ExpressionError:
        return _fail(self._next.position, f"expected {expected}, found {self._next.text}")

    def _take(self) -> _Token:
        token = self._next
        self._index += 1
        return token

    def _accept(self, *texts: str) -> _Token | None:
        if self._next.sort in ("keyword", "sign") and self._next.text in texts:
            return self._take()
        return None

    def _require(self, text: str) -> _Token:
        token = self._accept(text)
        if token is None:
            raise self._unexpected(text)
        return token

    def _either(self) -> _Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _fail(self._next.position, f"more than {_MAX_DEPTH} levels of brackets")
        node = self._both()
        while token := self._accept("OR"):
            node = _Node("or", token.position, parts=(node, self._both()))
        self._depth -= 1
        return node

    def _both(self) -> _Node:
        node = self._negation()
        while token := self._accept("AND"):
            node = _Node("and", token.position, parts=(node, self._negation()))
        return node

    def _negation(self) -> _Node:
        signs = []
        while token := self._accept("NOT"):
            signs.append(token)
        node = self._comparison()
        return _Node("not", signs[0].position, parts=(node,)) if len(signs) % 2 else node

    def _comparison(self) -> _Node:
        node = self._sum()
        while True:
            if token := self._accept(*_COMPARISONS):
                node = _Node("compare", token.position, _COMPARISONS[token.text], (node, self._sum()))
            elif token := self._accept("IS"):
                negated = self._accept("NOT") is not None
                self._require("NULL")
                node = self._negated(_Node("is_null", token.position, parts=(node,)), negated)
            elif self._next.text in ("NOT", "IN", "LIKE", "ILIKE", "BETWEEN") and self._next.sort == "keyword":
                negated = self._accept("NOT") is not None
                node = self._negated(self._membership(node), negated)
            else:
                return node

    @staticmethod
    def _negated(node: _Node, negated: bool) -> _Node:
        return _Node("not", node.position, parts=(node,)) if negated else node

    def _membership(self, node: _Node) -> _Node:
        if token := self._accept("BETWEEN"):
            low = self._sum()
            self._require("AND")
            high = self._sum()
            bounds = (("greater_equal", low), ("less_equal", high))
            return _Node(
                "and", token.position,
                parts=tuple(_Node("compare", token.position, name, (node, bound)) for name, bound in bounds),
            )  # fmt: skip
        if token := self._accept("IN"):
            self._require("(")
            values = [self._literal()]
            while self._accept(","):
                values.append(self._literal())
            self._require(")")
            return _Node("in", token.position, parts=(node, *values))
        token = self._accept("LIKE", "ILIKE")
        if token is None:
            raise self._unexpected("IN, LIKE, ILIKE or BETWEEN")
        pattern = self._literal()
        if pattern.kind != "string":
            raise _fail(pattern.position, f"{token.text} needs a pattern in quotes, such as '%sunset%'")
        return _Node("like", token.position, (pattern.value, token.text == "ILIKE"), (node,))

    def _literal(self) -> _Node:
        node = self._factor()
        if node.kind not in ("number", "string"):
            raise _fail(node.position, "expected a number or a string in single quotes")
        return node

    def _sum(self) -> _Node:
        node = self._product()
        while token := self._accept("+", "-"):
            node = _Node("arithmetic", token.position, _ARITHMETIC[token.text], (node, self._product()))
        return node

    def _product(self) -> _Node:
        node = self._factor()
        while token := self._accept("*", "/"):
            node = _Node("arithmetic", token.position, _ARITHMETIC[token.text], (node, self._factor()))
        return node

    def _factor(self) -> _Node:
        negative = False
        first = self._next
        while token := self._accept("-", "+"):
            negative ^= token.text == "-"
        node = self._value()
        if not negative:
            return node
        if node.kind == "number":
            return _Node("number", first.position, -node.value)
        return _Node("arithmetic", first.position, "multiply", (_Node("number", first.position, -1), node))

    def _value(self) -> _Node:
        if self._accept("("):
            node = self._either()
            self._require(")")
            return node
        if token := self._accept("TRUE", "FALSE"):
            return _Node("boolean", token.position, token.text == "TRUE")
        token = self._next
        if token.sort == "number":
            self._take()
            whole = token.text.isdigit() and int(token.text) < 2**63
            return _Node("number", token.position, int(token.text) if whole else float(token.text))
        if token.sort == "string":
            self._take()
            return _Node("string", token.position, token.text[1:-1].replace("''", "'"))
        if token.sort == "quoted":
            self._take()
            return _Node("column", token.position, token.text[1:-1].replace('""', '"').lower())
        if token.sort == "word":
            self._take()
            return self._call(token) if self._accept("(") else _Node("column", token.position, token.text.lower())
        raise self._unexpected("a column, a value or a bracket")

    def _call(self, name: _Token) -> _Node:
        kinds = FUNCTIONS.get(name.text.lower())
        if kinds is None:
            raise _fail(name.position, f"no function {name.text}; known: {', '.join(FUNCTIONS)}")
        arguments = [self._sum()]
        while self._accept(","):
            arguments.append(self._sum())
        self._require(")")
        if len(arguments) != len(kinds[0]):
            raise _fail(name.position, f"{name.text} takes {len(kinds[0])} values, found {len(arguments)}")
        return _Node("call", name.position, name.text.lower(), tuple(arguments))


class Expression:
    """A parsed condition. `text` is as the user wrote it."""

    def __init__(self, text: str) -> None:
        """Parse `text`; raises ExpressionError that names the position (from 1) of what is wrong."""
        if len(text) > _MAX_CHARS:
            raise _fail(_MAX_CHARS, f"a condition has at most {_MAX_CHARS} characters; use a list file instead")
        self.text = text
        self._root = _Parser(text).parse()

    @property
    def names(self) -> tuple[str, ...]:
        """The columns it reads, lower case, each once, in the order of the text."""
        found: dict[str, None] = {}
        pending = [self._root]
        while pending:
            node = pending.pop()
            if node.kind == "column":
                found[node.value] = None
            pending.extend(reversed(node.parts))
        return tuple(found)

    def check(self, columns: Columns) -> None:
        """Raise ExpressionError where a column is unknown or an operator meets the wrong kind of value."""
        if (kind := _kind_of(self._root, columns)) != "boolean":
            raise _fail(self._root.position, f"this is a {kind}, not a condition; compare it with something")

    def evaluate(self, column: "Callable[[str], pa.Array]", num_rows: int) -> "pa.Array":
        """Return a boolean array of `num_rows`, null where the condition is unknown."""
        import pyarrow as pa

        value = _evaluate(self._root, column)
        return pa.repeat(value, num_rows) if isinstance(value, pa.Scalar) else value


def _kind_of(node: _Node, columns: Columns) -> Kind:
    if node.kind in ("number", "string", "boolean"):
        return node.kind  # type: ignore[return-value]
    if node.kind == "column":
        if node.value not in columns:
            raise _fail(node.position, f"no column {node.value}; known: {', '.join(sorted(columns))}")
        return columns[node.value]
    kinds = [_kind_of(part, columns) for part in node.parts]
    if node.kind in ("and", "or", "not"):
        _expect(node, kinds, "boolean")
        return "boolean"
    if node.kind == "arithmetic":
        _expect(node, kinds, "number")
        return "number"
    if node.kind == "call":
        wanted, result = FUNCTIONS[node.value]
        for part, kind, expected in zip(node.parts, kinds, wanted, strict=True):
            if kind != expected:
                raise _fail(part.position, f"{node.value} takes a {expected}, found a {kind}")
        return result
    if node.kind == "like":
        _expect(node, kinds, "string")
    elif node.kind in ("compare", "in"):
        for part, kind in zip(node.parts[1:], kinds[1:], strict=True):
            if kind != kinds[0]:
                raise _fail(part.position, f"a {kinds[0]} is compared with a {kind}")
    return "boolean"


def _expect(node: _Node, kinds: Sequence[Kind], expected: Kind) -> None:
    for part, kind in zip(node.parts, kinds, strict=True):
        if kind != expected:
            raise _fail(
                part.position, f"expected a {'condition' if expected == 'boolean' else expected}, found a {kind}"
            )


def _evaluate(node: _Node, column: "Callable[[str], pa.Array]") -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if node.kind in ("number", "string", "boolean"):
        return pa.scalar(node.value)
    if node.kind == "column":
        array = column(node.value)
        if pa.types.is_floating(array.type):
            return pc.if_else(pc.is_nan(array), None, array)
        return array
    if node.kind == "in":
        values = pa.array([part.value for part in node.parts[1:]])
        array = _evaluate(node.parts[0], column)
        if values.type != array.type and not pa.types.is_string(values.type):
            array, values = (item.cast(pa.float64(), safe=False) for item in (array, values))
        return pc.if_else(pc.is_null(array), None, pc.is_in(array, values))
    parts = [_evaluate(part, column) for part in node.parts]
    if node.kind in ("and", "or"):
        return (pc.and_kleene if node.kind == "and" else pc.or_kleene)(*parts)
    if node.kind == "not":
        return pc.invert(parts[0])
    if node.kind == "compare":
        return getattr(pc, node.value)(*parts)
    if node.kind == "is_null":
        return pc.is_null(parts[0])
    if node.kind == "like":
        pattern, ignore_case = node.value
        return pc.match_like(parts[0], pattern, ignore_case=ignore_case)
    if node.kind == "arithmetic":
        floats = [part.cast(pa.float64(), safe=False) for part in parts]
        value = getattr(pc, node.value)(*floats)
        return pc.if_else(pc.is_finite(value), value, None)  # a division by zero is unknown, as in SQL
    calls = {
        "length": pc.utf8_length,
        "lower": pc.utf8_lower,
        "upper": pc.utf8_upper,
        "abs": pc.abs,
        "least": lambda *values: pc.min_element_wise(*values, skip_nulls=False),
        "greatest": lambda *values: pc.max_element_wise(*values, skip_nulls=False),
    }
    return calls[node.value](*parts)
