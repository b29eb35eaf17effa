"""Orders, transforms and importance scores from other packages, named in a setting as module:name."""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

from flexgs.errors import UserError

T = TypeVar("T")
VARIABLE = "FLEXGS_EXTENSIONS"
"""Environment variable with the modules, separated by commas, that settings may name. Nothing else is
imported: a config or a model may come from a stranger."""


def named(option: str, name: str, known: Mapping[str, T], kind: type | None = None) -> T:
    """Return the class or function that a setting names.

    Args:
        option: the setting, for messages.
        name: a key of `known`, or module:name of a module that FLEXGS_EXTENSIONS allows.
        known: the built-in choices.
        kind: the base class that an extension must have; None: any function will do.

    Raises:
        UserError: there is no such name, it may not be imported, or it is of another kind.
    """
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"{option} {name}: unknown; expected one of {', '.join(known)}, or "
                        "module:name (docs/extending.md)")
    if module not in os.environ.get(VARIABLE, "").split(","):
        raise UserError(f"{option} {name}: {module} is none of the modules that {VARIABLE} allows to "
                        f"import; if you trust it, set {VARIABLE}={module}")
    try:
        found: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise UserError(f"{option} {name}: cannot be imported ({e}); expected module:name, the "
                        "module in PYTHONPATH") from e
    if not (isinstance(found, type) and issubclass(found, kind) if kind else callable(found)):
        raise UserError(f"{option} {name}: found a {type(found).__name__}, expected "
                        f"{f'a subclass of {kind.__module__}.{kind.__name__}' if kind else 'a function'}")
    return found
