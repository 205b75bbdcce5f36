"""The two exceptions that lightspine raises; the command line prints them as one sentence."""


class LightspineError(Exception):
    """A valid call that failed, for example on an unreadable file or a diverged training (exit status 1)."""

    exit_status = 1


class UsageError(LightspineError, ValueError):
    """An invalid call, for example an unknown name or a wrong shape (exit status 2)."""

    exit_status = 2
