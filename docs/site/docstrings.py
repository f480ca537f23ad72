"""How the API reference reads our docstrings."""

from typing import Any

import griffe
from references import split_arguments


class GroupedArguments(griffe.Extension):
    """Gives each argument that a docstring describes together with others an entry of its own.

    What the docstring of a pydantic schema calls arguments are its fields.
    """

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = split_arguments(obj.docstring.value)
            schema = obj.is_class and any(str(base) in ("BaseModel", "Strict") for base in obj.bases)
            obj.docstring.value = text.replace("Args:\n", "Attributes:\n") if schema else text
