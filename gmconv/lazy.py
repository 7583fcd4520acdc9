"""Names of a package that are imported when first used (PEP 562), so that a command's `--help` waits for nothing."""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself takes longer than what a server has between its start and a signal
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def late(place: str) -> Callable[..., Any]:
    """The function "module:name", imported when it is called: what stands below may be shown by what stands above."""

    def call(*args: Any, **kwargs: Any) -> Any:
        import importlib

        module, _, name = place.partition(":")
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def attach(package: str, home: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of the package whose public names are in `home`.

    home: name -> the module that has it, ".module" for one inside of the package; "module:other" where it has another
    name there, "module:" where the name is the module.
    """

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        import importlib

        path, colon, own = home[name].partition(":")
        if not path.startswith("."):
            importlib.import_module("gmconv.packages").refuse_hidden()
        try:
            module = importlib.import_module(path, package)
        except ModuleNotFoundError as error:
            if sentence := importlib.import_module("gmconv.packages").missing(error):
                raise importlib.import_module("gmconv.errors").UnavailableError(sentence) from error
            raise
        return module if colon and not own else getattr(module, own or name)

    return get, lambda: sorted(home)
