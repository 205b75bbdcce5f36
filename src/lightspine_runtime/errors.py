"""The two kinds of error that a user can cause or meet; the command line turns them into one sentence."""


class LightspineError(Exception):
    """A correct call met something that failed: an unreadable file, a diverged training (exit status 1)."""

    exit_status = 1


class UsageError(LightspineError, ValueError):
    """The call itself was wrong: an unknown name, a wrong shape, a folder without classes (exit status 2)."""

    exit_status = 2
