"""The one exception for mistakes that the person at the keyboard can mend."""


class UserError(ValueError):
    """A sentence that names the offending thing and the remedy; the command line prints it and exits with 2."""
