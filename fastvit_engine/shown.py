"""Makes text fit to be shown or recorded: URLs without their secrets, and control characters escaped.

Everything that leaves the engine passes here: messages of errors, lines on a terminal, logs, events, and the files of a
run. Names of classes, samples and files come from data that nobody vouches for; URLs may hold passwords and signatures.
"""

import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TextIO

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TOKEN = re.compile(r"\S*")
_TAIL = re.compile(r"""[\\'")\]}>,;:.]*$""")  # what a sentence puts behind a URL
_PORT = re.compile(r"[0-9{},.]*")  # as a number, or in a brace pattern
_ON_WEB_SERVERS = ("http://", "https://", "ftp://", "ftps://")
_WITH_CONTAINERS = ("abfs://", "abfss://", "wasb://", "wasbs://")  # CONTAINER@ACCOUNT is the place, not a user
_QUERY_WITH_NAMES = re.compile(r"\?[\w.%~-]+=")  # elsewhere, "?" may be a wildcard
_PARAMETER = re.compile(
    r"([?&](?:x-(?:amz|goog)-[a-z-]+|sig|signature|\w*token|\w*secret|password|awsaccesskeyid|googleaccessid"
    r"|key-pair-id|policy|credential)=)[^\s&'\"]+",
    re.IGNORECASE,
)
_VALUE = r"""(?:(\\?['"]).*?\3|[^\s'"]+)"""
_OF_A_COMMAND = re.compile(
    r"(?:((?:^|\s)(?:-H|--header|--proxy-header|--user|--proxy-user|--\w*password|--\w*token|--oauth2-bearer)(?:\s+|=)"
    r"|\b\w*(?:secret|token|passw(?:or)?d|access_?key|api_?key)\w*=)|((?:^|\s)-u\s+)(?=\S*:))" + _VALUE,
    re.IGNORECASE,
)
# C0 and C1, which terminals obey; direction marks, which reorder what is read; separators of lines; lone surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def brief(value: object, most: int = 200) -> str:
    """As much of what a file says as a sentence may hold, in characters."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


@lru_cache(4096)  # readers ask for each sample
def public_url(url: str) -> str:
    """The URL without user name, password, query and fragment. A local path and a pattern stay as they are.

    On object stores "#" belongs to a key and "?" is a wildcard, unless a parameter with a name follows it.
    """
    scheme = _SCHEME.match(url)
    if scheme is None or _SCHEME.search(url, scheme.end()):
        return without_secrets(url)
    return scheme[0] + _public_rest(scheme[0].lower(), url[scheme.end() :])


def without_secrets(text: str) -> str:
    """The text with each URL in it as `public_url` has it, and pipes without the values of options that are secret."""
    if "://" in text:
        text = _without_secrets_of_urls(text)
    if "pipe:" in text:
        text = _OF_A_COMMAND.sub(lambda match: f"{match[1] or match[2]}...", text)
    return _PARAMETER.sub(r"\1...", text) if "=" in text else text


def escaped(text: str) -> str:
    r"""The text in one line: control characters, direction marks and undecodable bytes as "\x1b", "\n", "\u202e"."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shown(text: str) -> str:
    """The text as one line that may be shown: without secrets, and escaped."""
    return escaped(without_secrets(text))


def shown_lines(text: str) -> str:
    """As `shown`, for text of several lines: its line breaks and tabs stay."""
    text = without_secrets(text)
    return _CONTROL.sub(lambda match: match[0] if match[0] in "\n\t" else escaped(match[0]), text)


def recorded(value: Any) -> Any:
    """The value, of which JSON or YAML is made, with every text in it without secrets; keys too."""
    if isinstance(value, str):
        return public_url(value)
    if isinstance(value, dict):
        return {recorded(key): recorded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [recorded(inner) for inner in value]
    return value


_make_way: Callable[[], None] | None = None


def before_saying(make_way: Callable[[], None]) -> None:
    """From now on, `say` calls this first: a live display erases what it has drawn."""
    global _make_way
    _make_way = make_way


def say(text: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints the text as `shown_lines` has it, to stdout unless another stream is given, and flushes."""
    if _make_way is not None:
        _make_way()
    print(shown_lines(text), file=sys.stdout if file is None else file, end=end, flush=True)


def _without_secrets_of_urls(text: str) -> str:
    parts, position = [], 0
    while (scheme := _SCHEME.search(text, position)) is not None:
        start = scheme.end()
        token = _TOKEN.match(text, start)
        assert token is not None
        end = token.end()
        if _has_no_port(text[start:end]) and "@" not in text[start:end]:  # of a password that holds a space
            line_end = text.find("\n", end) if "\n" in text[end:] else len(text)
            at = text.find("@", end, line_end)
            if at >= 0:
                end = _TOKEN.match(text, at).end()  # type: ignore[union-attr]  # it matches anywhere
        inner = _SCHEME.search(text, start, end)
        query = _query(scheme[0].lower(), text[start:end])
        if inner is not None and inner.start() < start + query:
            end = inner.start()  # a chain such as zip://x::https://y
        rest = text[start:end]
        tail = _TAIL.search(rest)[0]  # type: ignore[index]  # it matches anywhere
        public = _public_rest(scheme[0].lower(), rest.removesuffix(tail))
        if "}" in tail and "{" in rest[query:]:  # closed within what is left out
            tail = tail.replace("}", "", 1)
        parts += [text[position:start], public, tail]
        position = end
    return "".join([*parts, text[position:]])


def _public_rest(scheme: str, rest: str) -> str:
    """What follows a scheme, without its secrets."""
    if scheme == "file://":
        return rest
    authority = re.match(r"[^/?#]*", rest)[0]  # type: ignore[index]  # it matches anywhere
    user, at, _ = authority.rpartition("@")
    if at and not (scheme in _WITH_CONTAINERS and ":" not in user):
        rest = rest[len(user) + 1 :]
    elif not at and _has_no_port(rest) and "@" in rest:  # of a password that holds "/", "?" or "#"
        rest = rest.rpartition("@")[2]
    return rest[: _query(scheme, rest)]


def _has_no_port(rest: str) -> bool:
    """Whether what looks like a port is none, and so probably the beginning of a password."""
    authority = re.match(r"[^/?#\s]*", rest)[0]  # type: ignore[index]  # it matches anywhere
    _, colon, port = authority.rpartition("]")[2].partition(":")
    return bool(colon and port) and not _PORT.fullmatch(_TAIL.sub("", port))


def _query(scheme: str, rest: str) -> int:
    """Where the query or the fragment begins; the length of `rest` if it has none."""
    if scheme in _ON_WEB_SERVERS:
        found = re.search(r"[?#]", rest)
    else:
        found = None if scheme == "file://" else _QUERY_WITH_NAMES.search(rest)
    return found.start() if found else len(rest)
