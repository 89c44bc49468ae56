"""The exceptions a user can meet. Each carries one clear line; the command line prints it and exits with code 2."""


class HfpruneError(Exception):
    """Anything that went wrong for a reason the user can act on."""


class ConfigError(HfpruneError, ValueError):
    """A recipe or configuration that asks for something unknown, malformed or impossible."""


class DataError(HfpruneError, ValueError):
    """Data that is missing, unreadable or of the wrong form."""


class ModelError(HfpruneError, ValueError):
    """A model that could not be found, built or pruned as asked."""


class CheckpointError(HfpruneError, RuntimeError):
    """A checkpoint that is incomplete, does not match its metadata or could not be written."""


class TrainingDiverged(HfpruneError, RuntimeError):
    """The loss stopped being a finite number."""


class Collapsed(HfpruneError, RuntimeError):
    """No pruning step kept the metric as near to the dense model's as it was to stay."""


class NotReachable(HfpruneError, OSError):
    """Something lies on the Hub or goes there, and the Hub could not be reached or refused."""


class Terminated(SystemExit):
    """SIGTERM, as an exception, so that what is half written is cleaned up; the exit code is 143."""

    def __init__(self) -> None:
        super().__init__(143)


def and_more(names: list[str]) -> str:
    """What stands behind the first of several names."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
