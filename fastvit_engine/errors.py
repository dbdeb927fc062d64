"""The exceptions that end a command with one sentence, and the exit codes that tell a launcher what to do next."""

from fastvit_engine.shown import shown

EXIT_BAD_INPUT = 2  # the same command would fail again
EXIT_RESTART = 75  # a failure that the same command may survive when started again (EX_TEMPFAIL of sysexits.h)
EXIT_PREEMPTED = 76  # stopped on request, and saved: start the same command again when the scheduler has capacity


class Sentence(Exception):
    """An exception whose message may be shown as it is: without secrets of URLs, control characters escaped.

    of_all: every process of the job raises it, so that one says it for all.
    """

    exit_code = EXIT_BAD_INPUT
    of_all = False

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class UserError(Sentence):
    """Bad input: the message says in one sentence what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    exit_code = EXIT_BAD_INPUT


class RestartError(Sentence):
    """The run cannot continue in these processes, but may after a restart from its checkpoint: exit code 75."""

    exit_code = EXIT_RESTART


class Preempted(Sentence):
    """The run was asked to stop and has saved its state: exit code 76."""

    exit_code = EXIT_PREEMPTED
