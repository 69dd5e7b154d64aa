"""The API's schema (OpenAPI 3.1, as FastAPI makes it), read for a page that shows all of it without any script.

The kept packages with a viewer are 1.7 MB of script in English, and need a policy that lets them style themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_BODY_TYPES = ("application/json",)


@dataclass(frozen=True)
class Part:
    """Of the words for a type."""

    text: str
    is_model: bool = False  # then the text is its name


Type = tuple[Part, ...]


@dataclass(frozen=True)
class Value:
    """A parameter of an endpoint, or a field of a model."""

    name: str
    type: Type
    is_required: bool
    text: str


@dataclass(frozen=True)
class Answer:
    status: str
    text: str
    type: Type | None


@dataclass(frozen=True)
class Endpoint:
    id: str
    method: str
    path: str
    title: str
    text: str
    values: list[Value]
    body: Type | None
    answers: list[Answer]


@dataclass(frozen=True)
class Model:
    name: str
    text: str
    type: Type  # in words; of one with fields: "object"
    values: list[Value]


@dataclass(frozen=True)
class Api:
    version: str
    text: str
    endpoints: list[Endpoint]
    models: list[Model]


def read_schema(schema: dict[str, Any]) -> Api:
    """:param schema: of a FastAPI application"""
    info = schema["info"]
    return Api(
        info["version"],
        info.get("description", ""),
        sorted(
            (
                _endpoint(method, path, operation)
                for path, operations in schema["paths"].items()
                for method, operation in operations.items()
            ),
            key=lambda endpoint: (endpoint.method, endpoint.path),
        ),
        [
            Model(name, _line(model), _type(model), _values(model))
            for name, model in sorted(schema.get("components", {}).get("schemas", {}).items())
        ],
    )


def _endpoint(method: str, path: str, operation: dict[str, Any]) -> Endpoint:
    return Endpoint(
        operation["operationId"],
        method.upper(),
        path,
        operation.get("summary", ""),
        _line(operation),
        [
            Value(each["name"], _type(each["schema"]), each.get("required", False), _line(each))
            for each in operation.get("parameters", [])
        ],
        _content_type(operation.get("requestBody", {})),
        [
            Answer(status, answer.get("description", ""), _content_type(answer))
            for status, answer in operation["responses"].items()
        ],
    )


def _content_type(holder: dict[str, Any]) -> Type | None:
    for kind in _BODY_TYPES:
        if schema := holder.get("content", {}).get(kind, {}).get("schema"):
            return _type(schema)
    return None


def _values(model: dict[str, Any]) -> list[Value]:
    required = model.get("required", [])
    return [
        Value(name, _type(schema), name in required, _line(schema))
        for name, schema in model.get("properties", {}).items()
    ]


def _line(holder: dict[str, Any]) -> str:
    return " ".join(holder.get("description", "").split())


def _type(schema: dict[str, Any]) -> Type:
    """In words; what is not known is "any"."""
    if reference := schema.get("$ref"):
        return (Part(reference.rpartition("/")[2], is_model=True),)
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return _either(map(_type, schema[word]))
    if "const" in schema or "enum" in schema:
        return _either((Part(f"“{value}”"),) for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array" and (schema.get("items") or schema.get("prefixItems")):
        return (Part("list of "), *_type(schema.get("items") or {"anyOf": schema["prefixItems"]}))
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return (*_type(schema["additionalProperties"]), Part(" by name"))
    limits = [
        f"{words} {schema[name]}"
        for name, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "at most"),
            ("maxLength", "of at most"),
            ("pattern", "like"),
        )
        if name in schema
    ]
    return (Part(f"{kind}, {', '.join(limits)}" if limits else str(kind)),)


def _either(types: Iterable[Type]) -> Type:
    parts: list[Part] = []
    for each in types:
        parts += [Part(" or "), *each] if parts else each
    return tuple(parts)
