"""Define the error that invalid input of a user raises."""


class ConfigError(ValueError):
    """Report a run file, an override or other input that cannot work.

    The message says what is wrong and what to do.
    """
