"""Errors that a user can cause. Their text is all that is shown: the thing, the reason, the remedy."""


class PipelineError(Exception):
    """Something outside the program is wrong: data, disk, cluster, server. Exit code 1, no traceback."""


class ConfigError(PipelineError):
    """The command line or a configuration is wrong. Exit code 2.

    `problems` holds one line for each fault found, so that all of them are reported at once.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return ConfigError, (self.problems,)
