"""The one exception that is a message to the user rather than a bug."""

INTERRUPTED = 130  # exit status after Ctrl-C, as shells give it


class UserError(Exception):
    """An expected failure: one line that says what was wrong and what to do. Printed without a traceback."""
