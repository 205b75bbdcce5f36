"""Errors of the runtime, with the same meaning and exit statuses as those of `lightspine.errors`."""


class LightspineError(Exception):
    """A valid call that failed, for example on an unreadable file (exit status 1)."""

    exit_status = 1


class UsageError(LightspineError, ValueError):
    """An invalid call, for example a missing file or a batch of the wrong shape (exit status 2)."""

    exit_status = 2
