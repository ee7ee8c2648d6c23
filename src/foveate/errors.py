"""What goes wrong for a user, as types. Every message names the value, the rule and the remedy, on one line."""


class FoveateError(ValueError):
    """Base of every error that a user can cause and mend; the command line turns it into one line and exit code 2."""


class ShapeError(FoveateError):
    """An array, tensor or image has a shape that the operation cannot take."""


class BudgetError(FoveateError):
    """A count or a size in bytes lies outside what is possible, such as ``max_leaves=0``."""


class FormatError(FoveateError):
    """A file is unreadable, mislabelled, dangerous, or holds values that are not allowed."""


class ConfigError(FoveateError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class MissingExtraError(FoveateError):
    """An optional dependency is not installed; the message says which command installs it."""
