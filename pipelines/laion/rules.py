"""Filter rules for LAION rows, vectorised over record batches.

Deduplication needs state across batches and is in `pipelines.laion.duplicates`.
"""

# pyarrow.compute makes its functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.laion.block_lists import DomainSet, OptOuts, hash_set, read_entries
from pipelines.laion.config import EntryList, LaionSubsetConfig
from pipelines.laion.hashes import hex_keys

# In order of application: a row is counted under the first rule that drops it.
REASONS = (
    "url_missing", "url_not_http", "opted_out", "url_denied", "url_not_allowed", "domain_denied", "domain_not_allowed",
    "text_empty", "text_too_short", "text_too_long", "text_few_words", "text_many_words", "language_missing",
    "language", "license_missing", "license", "similarity_missing", "similarity_low", "similarity_l14_missing",
    "similarity_l14_low", "aesthetic_missing", "aesthetic_low", "pwatermark_missing", "pwatermark_high",
    "punsafe_missing", "punsafe_high", "nsfw_missing", "nsfw", "size_missing", "too_small", "aspect_extreme",
    "where_unknown", "where", "duplicate_pair", "duplicate_url",
)  # fmt: skip

BoolArray = np.ndarray


@dataclass(frozen=True)
class Rows:
    """A batch with one column per role, and its sample keys as uint8 [rows, 16]."""

    batch: pa.RecordBatch
    keys: np.ndarray

    def __getitem__(self, role: str) -> pa.Array:
        return self.batch[role]


@dataclass(frozen=True)
class Rule:
    """`drops` returns a mask of the rows to drop; `columns` are the optional roles the rule reads; `field` is the
    configuration field that switches it on."""

    reason: str
    drops: Callable[[Rows], BoolArray]
    columns: tuple[str, ...] = ()
    field: str = ""


def rules_of(config: LaionSubsetConfig) -> list[Rule]:
    """Return the active rules in the order of `REASONS`.

    They read batches as `pipelines.laion.subset.read_batches` yields them: url and text as strings (text never null),
    numbers as float64, labels as strings or dictionaries of strings. Raises ThroughlineError where a list file can't be
    read.
    """
    rules = [
        Rule("url_missing", lambda rows: _mask(pc.equal(pc.fill_null(pc.binary_length(rows["url"]), 0), 0))),
        Rule("url_not_http", lambda rows: ~_is_http(rows["url"])),
        *_list_rules(config),
        *_text_rules(config),
    ]
    rules += _label_rules(config, "language", "languages_allowed")
    rules += _label_rules(config, "license", "licenses_allowed")
    for field in ("min_similarity", "min_similarity_l14", "min_aesthetic", "max_pwatermark", "max_punsafe"):
        threshold: float | None = getattr(config, field)
        if threshold is not None:
            drop = _threshold_rule(field, threshold)
            rules += _with_missing(config, f"{drop.columns[0]}_missing", drop)
    rules += _label_rules(config, "nsfw", "nsfw_allowed")
    rules += _size_rules(config)
    if config.where is not None:
        rules += _where_rules(config.where, config.keep_missing)
    return rules


def first_reasons(rules: list[Rule], rows: Rows) -> np.ndarray:
    """Return per row the index of the first rule that drops it, or -1 if none does."""
    reasons = np.full(len(rows.keys), -1, dtype=np.int16)
    for index, rule in enumerate(rules):
        mask = rule.drops(rows)
        if mask.any():
            reasons[(reasons < 0) & mask] = index
    return reasons


def _mask(array: pa.Array) -> BoolArray:
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)


def _is_http(urls: pa.Array) -> BoolArray:
    """Match ``^(?i)https?://[^/?#\\s]``. Lower-case schemes, nearly all rows, are compared as bytes, at a fifth of the
    regular expression's cost."""
    offsets = _offsets(urls).astype(np.int64)
    # Copied with padding, so that eight bytes can be read from the start of each URL.
    data = np.zeros(offsets[-1] - offsets[0] + 8, np.uint8)
    data[:-8] = np.frombuffer(urls.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    begins, ends = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    words = np.lib.stride_tricks.as_strided(data[:8].view("<u8"), (len(data) - 7,), (1,))[begins]
    is_https = words == _HTTPS
    after = begins + 7 + is_https
    # If a URL is too short for a host, these bytes belong to the next one: hence after < ends.
    found = (is_https | (words & _SEVEN_BYTES == _HTTP)) & (after < ends)
    found &= _BEGINS_HOST[data[np.minimum(after, len(data) - 1)]]
    rest = np.flatnonzero(~found)
    if len(rest):
        found[rest] = _mask(pc.match_substring_regex(urls.take(pa.array(rest)), r"^(?i)https?://[^/?#\s]"))
    return found


_HTTPS, _HTTP = (np.uint64(int.from_bytes(scheme, "little")) for scheme in (b"https://", b"http://"))
_SEVEN_BYTES = np.uint64((1 << 56) - 1)
# False for ASCII that no host begins with; bytes from 128 begin a non-ASCII letter.
_BEGINS_HOST = np.array([chr(byte) not in "/?#\t\n\f\r " for byte in range(256)])


def _list_rules(config: LaionSubsetConfig) -> Iterable[Rule]:
    if config.opt_outs is not None:
        yield Rule("opted_out", _opted_out(config.opt_outs))
    if config.urls_denied is not None:
        denied = hash_set(read_entries(config.urls_denied))
        yield Rule("url_denied", lambda rows: denied.contains(rows["url"]))
    if config.urls_allowed is not None:
        allowed = hash_set(read_entries(config.urls_allowed))
        yield Rule("url_not_allowed", lambda rows: ~allowed.contains(rows["url"]))
    if config.domains_denied is not None:
        bad = DomainSet(read_entries(config.domains_denied))
        yield Rule("domain_denied", lambda rows: bad.contains(rows["url"]))
    if config.domains_allowed is not None:
        good = DomainSet(read_entries(config.domains_allowed))
        yield Rule("domain_not_allowed", lambda rows: ~good.contains(rows["url"]))


def _opted_out(entry_list: EntryList) -> Callable[[Rows], BoolArray]:
    entries = OptOuts.read(entry_list)
    keys, urls, domains = hash_set(entries.keys), hash_set(entries.urls), DomainSet(entries.domains)

    def drops(rows: Rows) -> BoolArray:
        mask = urls.contains(rows["url"])
        if entries.keys:
            mask |= keys.contains(hex_keys(rows.keys))
        if entries.domains:
            mask |= domains.contains(rows["url"])
        return mask

    return drops


def _text_rules(config: LaionSubsetConfig) -> Iterable[Rule]:
    if not config.keep_empty_text:
        yield Rule("text_empty", lambda rows: _is_blank(rows["text"]))
    if (min_chars := config.min_text_chars) is not None:
        yield Rule("text_too_short", lambda rows: _is_shorter(rows["text"], min_chars))
    if (max_chars := config.max_text_chars) is not None:
        yield Rule("text_too_long", lambda rows: ~_is_shorter(rows["text"], max_chars + 1))
    if (min_words := config.min_text_words) is not None:
        yield Rule("text_few_words", lambda rows: _mask(pc.less(_num_words(rows["text"]), min_words)))
    if (max_words := config.max_text_words) is not None:
        yield Rule("text_many_words", lambda rows: _mask(pc.greater(_num_words(rows["text"]), max_words)))


def _offsets(strings: pa.Array) -> np.ndarray:
    """Return the offsets of the strings in the array's data buffer, int32 [rows + 1]."""
    return np.frombuffer(strings.buffers()[1], np.int32)[strings.offset : strings.offset + len(strings) + 1]


def _is_shorter(texts: pa.Array, num_chars: int) -> BoolArray:
    """Mark texts of fewer than `num_chars` characters. A character has one to four bytes; characters are counted only
    where the number of bytes doesn't decide."""
    num_bytes = np.diff(_offsets(texts))
    shorter = num_bytes < num_chars
    rest = np.flatnonzero(~shorter & (num_bytes <= 4 * (num_chars - 1)))
    if len(rest):
        shorter[rest] = _mask(pc.less(pc.utf8_length(texts.take(pa.array(rest))), num_chars))
    return shorter


def _is_blank(texts: pa.Array) -> BoolArray:
    """Mark texts that are empty or whitespace; only those that don't begin with visible ASCII are read in full."""
    offsets = _offsets(texts)
    data = np.frombuffer(texts.buffers()[2] or b"\0", np.uint8)
    first = data[np.minimum(offsets[:-1], len(data) - 1)]
    blank = (offsets[:-1] == offsets[1:]) | (first <= ord(" ")) | (first >= 128)
    rest = np.flatnonzero(blank)
    if len(rest):
        trimmed = pc.utf8_trim_whitespace(texts.take(pa.array(rest)))
        blank[rest] = _mask(pc.equal(pc.binary_length(trimmed), 0))
    return blank


def _num_words(texts: pa.Array) -> pa.Array:
    """Count words: runs of non-whitespace."""
    return pc.count_substring_regex(texts, r"[^\s\pZ\x0b\x1c-\x1f\x{85}]+")


def _label_rules(config: LaionSubsetConfig, role: str, field: str) -> list[Rule]:
    allowed: tuple[str, ...] | None = getattr(config, field)
    if allowed is None:
        return []
    words = pa.array([word.upper() for word in allowed], pa.string())

    def drops(rows: Rows) -> BoolArray:
        labels = rows[role]
        if not isinstance(labels, pa.DictionaryArray):
            labels = labels.dictionary_encode()
        wrong = _mask(pc.invert(pc.is_in(pc.utf8_upper(labels.dictionary.cast(pa.string())), words)))
        # Nulls have no dictionary index; the rule for missing values handles them.
        places = labels.indices.fill_null(len(wrong)).to_numpy(zero_copy_only=False)
        return np.append(wrong, False)[places]

    return _with_missing(config, f"{role}_missing", Rule(role, drops, (role,), field))


def _threshold_rule(field: str, threshold: float) -> Rule:
    bound, _, role = field.partition("_")
    compare, side = (pc.less, "low") if bound == "min" else (pc.greater_equal, "high")
    return Rule(f"{role}_{side}", lambda rows: _mask(compare(rows[role], threshold)), (role,), field)


def _size_rules(config: LaionSubsetConfig) -> list[Rule]:
    sides = ("width", "height")
    rules = []
    if (least := config.min_side_px) is not None:
        rules.append(
            Rule(
                "too_small",
                lambda rows: _is_below(rows["width"], least) | _is_below(rows["height"], least),
                sides,
                "min_side_px",
            )
        )
    if (most := config.max_aspect) is not None:
        rules.append(Rule("aspect_extreme", lambda rows: _aspects(rows) > most, sides, "max_aspect"))
    return _with_missing(config, "size_missing", *rules) if rules else []


def _is_below(numbers: pa.Array, least: float) -> BoolArray:
    """Mark numbers below `least`; null and NaN are not."""
    return _mask(pc.less(numbers, least))


def _aspects(rows: Rows) -> np.ndarray:
    """Return longer / shorter side, float64 [rows]; at most 1, or NaN, where a side is null or NaN."""
    width, height = (rows[side].to_numpy(zero_copy_only=False) for side in ("width", "height"))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.fmax(width, height) / np.fmin(width, height)


def _with_missing(config: LaionSubsetConfig, reason: str, *rules: Rule) -> list[Rule]:
    """Prepend the rule that drops missing values, unless they are kept."""
    if config.keep_missing:
        return list(rules)
    roles = rules[0].columns

    def drops(rows: Rows) -> BoolArray:
        return np.logical_or.reduce([_mask(pc.is_null(rows[role], nan_is_null=True)) for role in roles])

    return [Rule(reason, drops, roles, rules[0].field), *rules]


def _where_rules(where: str, keep_missing: bool) -> list[Rule]:
    from pipelines.laion.where import Condition

    condition = Condition(where)

    def holds(rows: Rows) -> pa.Array:
        def column(name: str) -> pa.Array:
            array = rows[name]
            return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array

        return condition.evaluate(column, len(rows.keys))

    false = Rule("where", lambda rows: _mask(pc.invert(holds(rows))))
    if keep_missing:
        return [false]
    return [Rule("where_unknown", lambda rows: _mask(pc.is_null(holds(rows)))), false]
