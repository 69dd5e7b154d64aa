"""Run specs as YAML: read with one clear line per mistake, written with a comment on every field."""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kantha.errors import SpecError
from kantha.spec.models import RunSpec

_COMMENT_WIDTH = 100


def load_spec(path: Path) -> RunSpec:
    """Read a run spec from a YAML file.

    Raises `SpecError` with one line per mistake: the line in the file, the path of the field, what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(str(path), ["no such file; `kantha init` writes one to start from"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [f"cannot be read as UTF-8 text ({error})"]) from None
    return parse_spec(text, str(path))


def parse_spec(text: str, source: str) -> RunSpec:
    """Check the text of a run spec; `source` names it in messages. Raises `SpecError`."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SpecError(source, [f"{place}not valid YAML ({problem})"]) from None
    except RecursionError:
        raise SpecError(source, ["nested too deeply for a run spec; see `kantha init`"]) from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # PyYAML's, for dates and tags without sense
        raise SpecError(source, [f"a value is not of the kind it seems to be ({error}); put it in quotes"]) from None
    if root is not None and (repeated := list(_repeated_keys(root))):
        raise SpecError(source, repeated)
    if not isinstance(content, dict):
        raise SpecError(source, ["is not a run spec: expected `name: …` and the other fields; see `kantha init`"])
    try:
        return RunSpec.model_validate(content)
    except ValidationError as error:
        mistakes = error.errors()
        around = {mistake["loc"][:depth] for mistake in mistakes for depth in range(len(mistake["loc"]))}
        # a list whose items are all mistaken counts as empty, too, which is no mistake of its own
        real = [m for m in mistakes if m["type"] != "too_short" or m["loc"] not in around]
        raise SpecError(source, [_describe(dict(mistake), root) for mistake in real]) from None


def _repeated_keys(root: yaml.Node) -> Iterator[str]:
    """A line for every key that stands twice in one mapping: PyYAML would silently take the last."""
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key.value, str) and key.value in lines:
                    yield f"line {line}: {key.value}: stands in line {lines[key.value]} already; take one out"
                elif isinstance(key.value, str):
                    lines[key.value] = line
                todo.append(value)


def _describe(mistake: dict[str, Any], root: yaml.Node | None) -> str:
    location = mistake["loc"]
    line, path = _locate(location, root)
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        message = "no such field; check the spelling, or take the line out"
    elif mistake["type"] == "missing":
        message = "is missing"
    elif not isinstance(mistake.get("input"), dict | list):
        message = f"{message} (found {mistake['input']!r})"
    return f"line {line}: {path}: {message}" if path else f"line {line}: {message}"


def _locate(location: tuple[int | str, ...], node: yaml.Node | None) -> tuple[int, str]:
    """Follow a pydantic location through the YAML nodes to (line, dotted path); union tags are skipped."""
    line, path = 1, ""
    for step in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == step:
                    line, node = key.start_mark.line + 1, value
                    break
            else:  # a missing field, or the tag of a union, which is no part of the file
                if step not in ("shobdo", "file", "huggingface"):
                    path += f".{step}"
                continue
            path += f".{step}"
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
            path += f"[{step}]"
        else:
            path += f".{step}"
    return line, path.lstrip(".")


def dump_spec(spec: RunSpec) -> str:
    """The spec as YAML, every field under a comment that explains it."""
    intro = (
        "# A Kantha run spec: all that the volunteers of one run must agree on.\n"
        "# Next: edit it, then `kantha create {this file} {run directory}`.\n"
    )
    return intro + "\n".join(_lines(spec, 0)) + "\n"


def _lines(part: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if value is None:
            continue
        if depth == 0:
            yield ""
        yield from textwrap.wrap(
            field.description or "", _COMMENT_WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(value, depth + 1)
        elif isinstance(value, Mapping):
            yield f"{indent}{name}:" if value else f"{indent}{name}: {{}}"
            for key, item in value.items():
                yield f"{indent}  {key}:"
                yield from _lines(item, depth + 2)
        elif isinstance(value, tuple):
            yield f"{indent}{name}:" if value else f"{indent}{name}: []"
            for item in value:
                if not isinstance(item, BaseModel):
                    yield f"{indent}  - {_scalar(item)}"
                    continue
                body = list(_lines(item, depth + 2))
                start = next(i for i, line in enumerate(body) if not line.lstrip().startswith("#"))
                body[start] = f"{indent}  - {body[start].lstrip()}"
                yield from body
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, allow_unicode=True, width=10_000, default_flow_style=True)
    return text.strip().removesuffix("\n...")
