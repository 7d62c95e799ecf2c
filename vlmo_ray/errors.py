"""The exceptions whose message is a sentence for people: for the user, and about one record."""


class UserError(ValueError):
    """Names what is wrong and the remedy. The command line prints the sentence and exits with 2."""


class RecordError(ValueError):
    """Why one record cannot be used, in a few words. Its row is masked, counted and reported."""


class DecodeError(RecordError):
    """Why the bytes of one record cannot be used as an image."""
