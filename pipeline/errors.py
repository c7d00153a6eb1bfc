"""Errors that a user can cause. Their text is all that is printed: the thing, the reason, the remedy."""

import difflib
from collections.abc import Iterable
from urllib.parse import urlsplit


class PipelineError(Exception):
    """An error outside the program: data, disk, cluster or server. Exit code 1, no traceback."""


class ConfigError(PipelineError):
    """An error in the command line or a configuration: all problems found, a line each. Exit code 2."""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return ConfigError, (self.problems,)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean 'x'?)', or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


NETWORK_REASONS = ("connection refused", "timed out", "name or service not known", "no route to host")


def explain_network_error(error: Exception) -> str:
    """Return in a few words why a server cannot be reached; clients wrap the reason in long messages."""
    text = f"{error} {error.__context__}".lower()
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((reason for reason in NETWORK_REASONS if reason in text), lines[0][:160])


def hide_password(uri: str) -> str:
    """Return the URI without user and password, so that it can be printed."""
    user, at, _ = urlsplit(uri).netloc.rpartition("@")
    return uri.replace(f"{user}{at}", "", 1) if at else uri


def shorten_error(error: BaseException | str) -> str:
    """Return the last line of an error; of Ray's memory errors the line with the numbers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    memory = [line for line in lines if "running low on memory" in line]
    name = "no reason given" if isinstance(error, str) else type(error).__name__
    return (memory or lines[-1:] or [name])[0][:300]
