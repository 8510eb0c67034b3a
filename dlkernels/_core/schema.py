"""Schemas of operators, made from the annotations of the functions that arrange their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from torch import Tensor

__all__ = ["schema_of"]

_TYPES: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool"}


def schema_of(operator: str, arrange: Callable[..., tuple[Any, ...]], fake: Callable[..., Any]) -> str:
    """The schema of `operator`, for `torch.library.Library.define`.

    arrange: takes the operator's arguments and returns them in the order of the schema. A parameter may be a NamedTuple
        of arguments, whose fields have the names of the schema. It is called with "type name" in place of each value.
    fake: what it returns is annotated with the types of the results, `Annotated` with their names if they have any.
    """
    described = [_described(name, type_) for name, type_ in _annotations(arrange).items() if name != "return"]
    return f"{operator}({', '.join(arrange(*described))}) -> {_results(_annotations(fake)['return'])}"


def _annotations(of: Any) -> dict[str, Any]:
    return get_type_hints(of, include_extras=True)


def _described(name: str, type_: Any) -> Any:
    if isinstance(type_, type) and issubclass(type_, tuple):
        return type_(*(_described(*field) for field in _annotations(type_).items()))
    return f"{_TYPES[type_]} {name}"


def _results(type_: Any) -> str:
    if get_origin(type_) is Annotated:
        results, *names = get_args(type_)
        named = (f"{_TYPES[each]} {name}" for each, name in zip(get_args(results), names, strict=True))
        return f"({', '.join(named)})"
    return "Tensor[]" if type_ == list[Tensor] else _TYPES[type_]
