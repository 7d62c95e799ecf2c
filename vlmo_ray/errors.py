"""The two exceptions that carry a sentence: for the person at the keyboard, and about one record."""


class UserError(ValueError):
    """A sentence that names the offending thing and the remedy; the command line prints it and exits with 2."""


class RecordError(ValueError):
    """Why one record cannot be used, short enough for a report line. Its row is masked, counted and named."""
