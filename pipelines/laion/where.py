"""Conditions for `where`: one SQL expression over a row's columns, parsed by sqlglot, evaluated by pyarrow.compute.

Supported, in any case: comparisons (``= == != <> < <= > >=``), AND, OR, NOT, [NOT] IN, [NOT] LIKE and ILIKE, IS [NOT]
NULL, [NOT] BETWEEN, ``+ - * /``, the functions of `FUNCTIONS`, TRUE, FALSE, numbers, 'strings' and "quoted names".
Logic is three-valued as in SQL: comparing null gives unknown, and NaN counts as null. Everything else of SQL is
refused: a condition reads its own row and calls nothing but `FUNCTIONS`.
"""

# pyarrow.compute makes its functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from textwrap import shorten
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from sqlglot import exp
from sqlglot.errors import ParseError, TokenError
from sqlglot.parser import Parser
from sqlglot.tokens import Token, Tokenizer, TokenType

from pipelines.core.errors import ThroughlineError

_Kind = Literal["number", "string", "boolean"]
_MAX_CHARS = 10_000
_MAX_BRACKETS = 20  # sqlglot takes about 20 stack frames per level, of Python's 1,000
_MAX_DEPTH = 100

# Function -> kinds of its arguments.
FUNCTIONS: Mapping[str, tuple[_Kind, ...]] = {
    "length": ("string",),
    "lower": ("string",),
    "upper": ("string",),
    "abs": ("number",),
    "least": ("number", "number"),
    "greatest": ("number", "number"),
}

# sqlglot's names of tokens. Every other word is a column name, even if it is a keyword elsewhere in SQL.
_COMPARISON_TOKENS = frozenset({"EQ", "NEQ", "LT", "LTE", "GT", "GTE", "IN", "LIKE", "ILIKE", "IS", "BETWEEN"})
_TOKENS = _COMPARISON_TOKENS | {
    "AND", "OR", "NOT", "NULL", "TRUE", "FALSE", "PLUS", "DASH", "STAR", "SLASH", "L_PAREN", "R_PAREN", "COMMA",
    "NUMBER", "STRING", "IDENTIFIER",
}  # fmt: skip
_WORD = re.compile(r"[^\W\d]\w*")
_FRACTION = re.compile(r"(?<![\w\")])\.\d")  # sqlglot reads .5 as two tokens
_COMPARISONS = {
    "eq": "equal", "neq": "not_equal", "lt": "less", "lte": "less_equal", "gt": "greater", "gte": "greater_equal",
}  # fmt: skip
_OPERANDS = frozenset({"this", "expression", "expressions", "low", "high"})
_ARITHMETIC = {"neg": "negate", "add": "add", "sub": "subtract", "mul": "multiply", "div": "divide"}


class ConditionError(ThroughlineError):
    """A condition that can't be parsed, or doesn't fit the columns."""


def _error(position: int, message: object) -> ConditionError:
    return ConditionError(f"where, position {position}: {message}")


class Condition:
    """A parsed condition."""

    def __init__(self, text: str) -> None:
        """Raises ConditionError where no table could make the condition valid; it names the position, from 1."""
        if len(text) > _MAX_CHARS:
            raise _error(_MAX_CHARS, f"a condition has at most {_MAX_CHARS} characters; use a list file instead")
        self._root = _parse(text)
        self.evaluate(lambda name: pa.nulls(0), 0)

    def evaluate(self, column: Callable[[str], pa.Array], num_rows: int) -> pa.Array:
        """Return a boolean array of `num_rows`, null where the condition is unknown.

        `column` returns the values of a name: strings, int64, float64, booleans, or an array of type null, which fits
        everywhere. Names are in lower case, quoted ones as written and with their double quotes. Raises ConditionError
        for values of the wrong kind, even if there are no rows, and where `column` raises ThroughlineError.
        """
        value = _Evaluator(column).condition(self._root)
        return pa.repeat(value, num_rows) if isinstance(value, pa.Scalar) else value


class _Parser(Parser):
    # sqlglot rewrites the calls that it knows; without these every call is a plain one.
    FUNCTIONS: ClassVar[Any] = {}
    FUNCTION_PARSERS: ClassVar[Any] = {}
    NO_PAREN_FUNCTION_PARSERS: ClassVar[Any] = {}


def _parse(text: str) -> exp.Expr:
    try:
        tokens = _names_and_operators(Tokenizer().tokenize(text), text)
        (root,) = _Parser().parse_into(exp.Condition, tokens, text)
    except TokenError as error:
        raise _error(len(text) + 1, "expected the closing quote of a string or a name, found the end") from error
    except ParseError as error:
        raise _syntax_error(text, error.errors[0]) from error
    except RecursionError as error:
        raise _error(1, "the condition is nested too deeply") from error
    assert root is not None
    _check_brackets(tokens)
    return root


def _names_and_operators(tokens: Sequence[Token], text: str) -> list[Token]:
    """Return the tokens with every word that is not an operator as a name.

    Raises ConditionError at a token that no condition has.
    """
    if not tokens:
        raise _error(1, "the condition is empty")
    known = []
    for token in tokens:
        kind, written = token.token_type.name, text[token.start : token.end + 1]
        if token.comments:
            raise _error(token.start + 1, "a condition has no comments; write - -1 with a space")
        if kind in _TOKENS or (kind == "DOT" and _FRACTION.match(text, token.start)):
            known.append(token)
        elif _WORD.fullmatch(written):
            known.append(Token(TokenType.VAR, written, token.line, token.col, token.start, token.end))
        else:
            raise _meaningless(token.start, written)
    return known


def _meaningless(start: int, written: str) -> ConditionError:
    return _error(start + 1, f"{written!r} has no meaning here; a condition looks like aesthetic > 5 AND width >= 512")


def _check_brackets(tokens: Sequence[Token]) -> None:
    """Refuse deep nesting, and comparisons in a row: SQL dialects disagree on what a = b IS NULL means."""
    comparisons = [0]
    for token in tokens:
        kind, position = token.token_type.name, token.start + 1
        if kind == "L_PAREN":
            comparisons.append(0)
            if len(comparisons) > _MAX_BRACKETS + 1:
                raise _error(position, f"more than {_MAX_BRACKETS} levels of brackets")
        elif kind == "R_PAREN" and len(comparisons) > 1:
            comparisons.pop()
        elif kind in ("AND", "OR", "COMMA"):
            comparisons[-1] = 0
        elif kind in _COMPARISON_TOKENS:
            comparisons[-1] += 1
            if comparisons[-1] > 1:
                raise _error(position, f"{token.text} follows another comparison; put brackets around one of them")


def _syntax_error(text: str, found: Mapping[str, Any]) -> ConditionError:
    before = sum(len(line) + 1 for line in text.split("\n")[: found["line"] - 1])
    word = found["highlight"]
    position = before + found["col"] - len(word) + 1
    if found["description"].startswith("Invalid expression"):
        return _error(position, f"expected AND, OR or the end, found {word}")
    return _error(position, f"incomplete at {word}; a column, a value or a bracket is missing")


def _reference(column: exp.Expr) -> str:
    return f'"{column.name}"' if column.this.args.get("quoted") else column.name.lower()


def _position(node: exp.Expr, otherwise: int = 1) -> int:
    """Return where a node's text begins, from 1; sqlglot gives positions to names, values and calls alone."""
    return min((part.meta["start"] + 1 for part in node.walk() if "start" in part.meta), default=otherwise)


def _literal(node: exp.Expr) -> int | float | str | bool | None:
    """Return the value of a literal, which may be negated or in brackets; None for anything else."""
    if node.key == "paren":
        return _literal(node.this)
    if node.key == "neg":
        value = _literal(node.this)
        return -value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if node.key == "boolean":
        return bool(node.this)
    if node.key != "literal":
        return None
    if node.args["is_string"]:
        return str(node.this)
    try:
        return int(node.this) if node.this.isdigit() and int(node.this) < 2**63 else float(node.this)
    except ValueError as error:
        raise _error(_position(node), f"{node.this} is not a number") from error


class _Evaluator:
    """Evaluates the nodes that a condition may have, over the columns of a batch, and refuses all others."""

    def __init__(self, column: Callable[[str], pa.Array]) -> None:
        self._column = column
        self._depth = 0

    def condition(self, root: exp.Expr) -> Any:
        value = self._value(root)
        if (kind := _kind(value)) in ("number", "string"):
            raise _error(_position(root), f"this is a {kind}, not a condition; compare it with something")
        return _alike([value], "boolean")[0]

    def _value(self, node: exp.Expr) -> Any:
        """Return an array, or a scalar where the value is the same for all rows."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _error(_position(node), "the condition is nested too deeply")
        literal = _literal(node)
        value = self._evaluate(node) if literal is None else pa.scalar(literal)
        self._depth -= 1
        return value

    def _evaluate(self, node: exp.Expr) -> Any:
        flags = {name for name, value in node.args.items() if value} - _OPERANDS
        match node.key:
            case "like" | "ilike" if flags <= {"negate"}:
                value = self._like(node)
                return pc.invert(value) if flags else value
            case _ if flags:  # a modifier that this evaluator would ignore
                pass
            case "paren":
                return self._value(node.this)
            case "column" if isinstance(node, exp.Column) and len(node.parts) == 1:
                return self._read(node)
            case "and" | "or":
                return reduce(getattr(pc, f"{node.key}_kleene"), self._all("boolean", *node.flatten()))
            case "not":
                return pc.invert(*self._all("boolean", node.this))
            case "neg" | "add" | "sub" | "mul" | "div":
                return self._arithmetic(node)
            case "is" if node.expression.key == "null":
                return pc.is_null(self._value(node.this))
            case "in" if node.expressions:
                return self._is_in(node)
            case "between":
                value, low, high = self._comparable(node.this, node.args["low"], node.args["high"])
                return pc.and_kleene(pc.greater_equal(value, low), pc.less_equal(value, high))
            case "anonymous":
                return self._call(node)
            case key if key in _COMPARISONS:
                return getattr(pc, _COMPARISONS[key])(*self._comparable(node.this, node.expression))
        raise _error(_position(node), f"a condition can't contain {shorten(node.sql(), 60)}")

    def _read(self, node: exp.Expr) -> Any:
        try:
            array = self._column(_reference(node))
        except ThroughlineError as error:
            raise _error(_position(node), error) from error
        return pc.if_else(pc.is_nan(array), None, array) if pa.types.is_floating(array.type) else array

    def _all(self, expected: _Kind, *nodes: exp.Expr) -> list[Any]:
        """Return values of one kind."""
        values = []
        for node in nodes:
            value = self._value(node)
            if (kind := _kind(value)) not in (expected, None):
                wanted = "condition" if expected == "boolean" else expected
                raise _error(_position(node), f"expected a {wanted}, found a {kind}")
            values.append(value)
        return _alike(values, expected)

    def _comparable(self, *nodes: exp.Expr) -> list[Any]:
        """Return values of the same kind, whichever it is."""
        values = [self._value(node) for node in nodes]
        kinds = [_kind(value) for value in values]
        known: _Kind = next((kind for kind in kinds if kind), "number")
        for node, kind in zip(nodes, kinds, strict=True):
            if kind not in (known, None):
                raise _error(_position(node, _position(nodes[0])), f"a {known} is compared with a {kind}")
        return _alike(values, known)

    def _arithmetic(self, node: exp.Expr) -> Any:
        operands = self._all("number", node.this, *([node.expression] if node.key != "neg" else []))
        floats = [operand.cast(pa.float64(), safe=False) for operand in operands]
        value = getattr(pc, _ARITHMETIC[node.key])(*floats)
        return pc.if_else(pc.is_finite(value), value, None)  # a division by zero is unknown, as in SQL

    def _like(self, node: exp.Expr) -> Any:
        pattern = _literal(node.expression)
        if not isinstance(pattern, str):
            position = _position(node.expression, _position(node))
            raise _error(position, f"{node.key.upper()} needs a pattern in quotes, such as '%sunset%'")
        return pc.match_like(*self._all("string", node.this), pattern, ignore_case=node.key == "ilike")

    def _is_in(self, node: exp.Expr) -> Any:
        for item in node.expressions:
            if (literal := _literal(item)) is None or isinstance(literal, bool):
                raise _error(_position(item, _position(node)), "expected a number or a string in single quotes")
        array, *values = self._comparable(node.this, *node.expressions)
        values = pa.array([value.as_py() for value in values], array.type)
        return pc.if_else(pc.is_null(array), None, pc.is_in(array, values))

    def _call(self, node: exp.Expr) -> Any:
        name = str(node.this)
        kinds = FUNCTIONS.get(name.lower())
        if kinds is None:
            raise _error(_position(node), f"no function {name}; known: {', '.join(FUNCTIONS)}")
        if len(node.expressions) != len(kinds):
            raise _error(_position(node), f"{name} takes {len(kinds)} values, found {len(node.expressions)}")
        values = self._all(kinds[0], *node.expressions)
        if name.lower() in ("least", "greatest"):
            function = pc.min_element_wise if name.lower() == "least" else pc.max_element_wise
            return function(*values, skip_nulls=False)
        if name.lower() == "length":
            return pc.utf8_length(*values).cast(pa.int64())
        return pc.abs(*values) if name.lower() == "abs" else getattr(pc, f"utf8_{name.lower()}")(*values)


def _kind(value: Any) -> _Kind | None:
    if pa.types.is_null(value.type):
        return None
    if pa.types.is_boolean(value.type):
        return "boolean"
    return "string" if pa.types.is_string(value.type) else "number"


def _alike(values: Sequence[Any], kind: _Kind) -> list[Any]:
    """Return values of one kind in one type; numbers become floats unless all of them are integers."""
    types = {value.type for value in values}
    if len(types) == 1 and not pa.types.is_null(values[0].type):
        return list(values)
    if kind == "number":
        return [value.cast(pa.float64(), safe=False) for value in values]
    return [value.cast(pa.string() if kind == "string" else pa.bool_()) for value in values]
