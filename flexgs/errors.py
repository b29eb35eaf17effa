"""The two ways a command ends badly: the user can mend it (exit code 2), or something failed (exit code 1)."""


class UserError(Exception):
    """One line for the user: the file or option, what was found, what was expected, what to do. Exit code 2."""


class MissingDependencyError(UserError):
    """An optional package is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, needed_for: str):
        super().__init__(f"{needed_for} needs the package {package}, which is not installed: "
                         f"pip install 'flexgs[{extra}]'")
