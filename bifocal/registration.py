"""Registers the models with transformers' Auto classes: at once if transformers is imported, else when it will be.

`import bifocal` and `bifocal --help` stay fast, since transformers and torch take seconds to import. Whoever reaches an
Auto class has imported transformers, so `AutoModel.from_pretrained` knows the models whichever is imported first.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any


class _Finder:
    """Finds transformers as the finders after this one do, with a loader that registers the models."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers":
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else finders:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Loads transformers as its own loader does, and then registers the models.

    Args:
        loader: transformers' own loader.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # of a loader that is being copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
        _remove_finder()


_FINDER = _Finder()


def register_with_transformers() -> None:
    """Register the models now if transformers is imported, otherwise at the end of its import."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)  # before the check: another thread may begin to import transformers after it
    if "transformers" in sys.modules:
        _register()
        _remove_finder()


def wait_for_transformers() -> None:
    """Wait if another thread is importing transformers.

    It replaces its module in the meantime, so `from transformers import ...` could fail in this thread.
    """
    if "transformers" in sys.modules:
        import transformers  # noqa: F401


def _register() -> None:
    """Register the models by importing `bifocal.modeling`.

    That import may have begun: it imports transformers first, and so waits for the end of transformers' import, in this
    thread or in another one. Then its code runs here once more, since its own end would come too late.
    """
    import bifocal.modeling  # noqa: F401  # an attribute of bifocal only at its end

    module = sys.modules["bifocal.modeling"]
    if not hasattr(module, "__all__"):
        spec = module.__spec__
        assert spec is not None
        assert spec.loader is not None
        try:
            spec.loader.exec_module(module_from_spec(spec))
        except RuntimeError as error:
            # The other thread holds a module within `bifocal.modeling` until this one has imported transformers. Then
            # it registers the models itself.
            if type(error).__name__ != "_DeadlockError":
                raise


def _remove_finder() -> None:
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
