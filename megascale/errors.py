"""Every error that a user can meet, one class per kind of fault, each with the exit code of the command.

A message says what was asked, the numbers, the rule, the nearest legal choice and the file, so that it can be
mended without reading the code. The command line prints the message alone; a traceback is for our own bugs.
"""

import re

EXIT_OK = 0
EXIT_DIFFERENT = 1
"""Two things that were compared are not the same."""
EXIT_USER = 2
"""The config, the data, the checkpoint or the call is at fault: nothing was started, nothing was written."""
EXIT_RUN = 3
"""The run itself failed: a rank died, or a loss or gradient was not finite."""
EXIT_STOPPED = 75
"""Asked to stop, saved, and can be resumed by the same command (EX_TEMPFAIL of sysexits.h)."""

EXIT_CRASH_LOOP = 93
"""Given up: several attempts in a row ended without progress. No job is requeued after it."""

EXIT_PEER_LOST = 76
"""This rank failed only because another one was gone: the launcher looks for the other's reason."""
PEER_LOST_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "recvValue failed")
"""By which the messages of gloo and NCCL tell that."""


def redact(text: str) -> str:
    """A message without the passwords and tokens of the urls in it."""
    without_users = re.sub(r"(?<=://)[^/?\s'\"]*@", "***@", text)
    return re.sub(r"(?<=\w)(://[^\s?'\"]*\?)[^\s'\"]+", r"\1***", without_users)


class MegascaleError(Exception):
    """Base of all errors that carry a message for the user; no message holds a url's secrets."""

    exit_code = EXIT_RUN

    def __init__(self, message: object = ""):
        super().__init__(redact(str(message)))


class ConfigError(MegascaleError):
    """A config file, an override or a combination of values that can't be run."""

    exit_code = EXIT_USER


class DataError(MegascaleError):
    """A corpus, tokenizer or shard that is missing, damaged or doesn't fit the model."""

    exit_code = EXIT_USER


class CheckpointError(MegascaleError):
    """A checkpoint that is missing, damaged, or belongs to another run."""

    exit_code = EXIT_USER


class SaveError(CheckpointError):
    """A checkpoint that couldn't be written; the run was under way, and its earlier checkpoints are whole."""

    exit_code = EXIT_RUN


class LeaseLostError(SaveError):
    """Another job has taken the run folder: this one must neither save nor go on."""


class LaunchError(MegascaleError):
    """Ranks that can't be started as asked on this machine."""

    exit_code = EXIT_USER


class NonFiniteError(MegascaleError):
    """A loss or gradient was NaN or infinite, and the policy is to stop."""


class LeakError(MegascaleError):
    """Documents of a row see each other though they are to be kept apart, or it can't be told whether they do."""

    exit_code = EXIT_DIFFERENT


class RankFailedError(MegascaleError):
    """A rank of the run died or reported an error of its own."""


class StopRequested(MegascaleError):  # noqa: N818 - not an error, but the way out of the loop
    """The run was asked to stop; its state is saved and the same command resumes it."""

    exit_code = EXIT_STOPPED
