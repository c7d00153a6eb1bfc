"""Errors that a user can cause. Only their text is printed: the thing, the reason, the remedy."""

import difflib
import re
from collections.abc import Iterable
from urllib.parse import unquote

UNPRINTABLE = r"[\0-\t\v-\x1f\x7f-\x9f\u2028\u2029\ud800-\udc7f\udd00-\udfff]"  # others of \ud800 are bytes


class PipelineError(Exception):
    """An error outside the program: data, disk, cluster or server. Exit code 1, no traceback."""

    def __str__(self) -> str:
        return escape_name(super().__str__())


class TransientError(PipelineError):
    """An error in writing that may pass, as of a file server that fails over."""


class ConfigError(PipelineError):
    """An error in the command line or a configuration: the problems, a line each, the first ten. Exit code 2."""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else problems
        rest = [f"and {len(self.problems) - 9} problems more"] if len(self.problems) > 10 else []
        lines = [problem.replace("\n", " ") for problem in self.problems[: 9 if rest else 10]]
        super().__init__("\n".join([*lines, *rest]))

    def __reduce__(self):
        return ConfigError, (self.problems,)


def escape_name(text: str) -> str:
    """Escape what cannot be printed or written in a name: bytes that are no UTF-8, and control characters."""
    text = re.sub(UNPRINTABLE, lambda found: ascii(found[0])[1:-1], text)
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean 'x'?)'; '' if no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


NETWORK_REASONS = ("connection refused", "timed out", "name or service not known", "no route to host")


def explain_network_error(error: Exception, uri: str = "") -> str:
    """Return the short reason why the server at `uri` cannot be reached, without the clients' long messages."""
    text = f"{error} {error.__context__}".lower()
    # SQLAlchemy may put a hint for programmers before the reason.
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(raised as a")]
    lines = lines or [type(error).__name__]
    reason = next((reason for reason in NETWORK_REASONS if reason in text), lines[0])
    values = re.sub(r"[?&;]\w+=", "?", uri)  # without the names of a query
    for word in re.split("[:@/?#&;=]", values):
        if len(word) > 2 and word not in hide_password(uri):
            reason = reason.replace(word, "***").replace(unquote(word), "***")
    return reason[:400]


def hide_password(uri: str) -> str:
    """Return the URI without user, password and query, so that it can be printed and recorded."""
    if uri.startswith("sqlite"):
        return uri.partition("?")[0]
    scheme, cut, rest = uri.partition("://") if "://" in uri else ("", "", uri)
    place = re.split("[?#]", rest, maxsplit=1)[0]
    user, _, host = place.rpartition("@")
    # An @ after a / or ? may end a password that should have been quoted: then no part of the URI is safe to show.
    return f"{scheme}{cut}{'...' if '/' in user or '@' in rest[len(place) :] else host}"


def shorten_error(error: BaseException | str) -> str:
    """Return the last line of an error, or for Ray's memory errors the line with the numbers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    memory = [line for line in lines if "running low on memory" in line]
    name = "no reason given" if isinstance(error, str) else type(error).__name__
    return (memory or lines[-1:] or [name])[0][:300]
