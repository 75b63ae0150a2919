"""From a YAML file and `a.b=c` overrides to a RunConfig, refusing whatever can't be meant.

PyYAML reads `3e-4` as a string and keeps the last of two equal keys; both are closed here.
"""

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megascale.config.schema import RunConfig
from megascale.errors import ConfigError

BASE_KEY = "base"


class StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `3e-4` as a number, as YAML 1.2 does."""


def _construct_mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r} in line {line} is not a word; quote it")
        if key in seen:
            raise ConfigError(f"key `{key}` stands twice, in lines {seen[key]} and {line}; keep one")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
               r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def load_config(path: Path, overrides: list[str] = ()) -> RunConfig:
    """Reads the config at `path`, its `base` if it names one, and applies overrides such as `train.max_steps=300`.

    Raises:
        ConfigError: a file that can't be read, a duplicate, unknown or missing key, a value of the wrong type.
    """
    values = _read_with_base(path)
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], source: str) -> RunConfig:
    """Checks plain values against the schema; `source` names where they came from in messages."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [explain_problem(problem, RunConfig) for problem in error.errors()]
        raise ConfigError(f"{source}: " + f"\n{source}: ".join(problems)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads one YAML mapping strictly."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a config file: {error}") from None
    try:
        values = yaml.load(text, Loader=StrictLoader)  # StrictLoader derives from SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not sections such as `run:` and `model:`")
    return values


def _read_with_base(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    base = values.pop(BASE_KEY, None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {base!r} is not the path of one parent file")
    parent_path = path.parent / base
    parent = read_yaml(parent_path)
    if BASE_KEY in parent:
        raise ConfigError(f"{parent_path}: is the base of {path} and names a base of its own; one parent is allowed")
    return _merge(parent, values)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_sections else value
    return merged


def apply_override(values: dict[str, Any], override: str) -> None:
    """Changes plain values as an override such as `train.max_steps=300` says; raises ConfigError if it says nothing."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override `{override}` is not of the form section.key=value")
    try:
        value = yaml.load(text, Loader=StrictLoader) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override `{override}`: the value is not valid YAML: {error}") from None
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override `{override}`: `{section}` is a value, not a section")
    values[name] = value


def explain_problem(problem: dict[str, Any], root: type[BaseModel]) -> str:
    """One of pydantic's findings in our words; `root` is the whole that was checked."""
    key = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key `{key}`{_did_you_mean(problem['loc'], root)}"
        case "missing":
            return f"`{key}` is missing and has no default"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            given = problem["input"]
            return f"{key} = {given!r} ({type(given).__name__}): {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _did_you_mean(location: tuple, root: type[BaseModel]) -> str:
    *sections, name = location
    section = _section_at(sections, root)
    if section is None:
        return ""
    close = difflib.get_close_matches(str(name), section.model_fields, n=1, cutoff=0.5)
    legal = ", ".join(section.model_fields)
    where = f"`{'.'.join(map(str, sections))}`" if sections else "a config"
    return (f"; did you mean `{close[0]}`?" if close else "") + f" (keys of {where}: {legal})"


def _section_at(sections: list, root: type[BaseModel]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = root
    for name in sections:
        field = current.model_fields.get(str(name))
        if field is not None:  # else it is a key of a dict of sections, or a number in a list of them
            current = _section_in(field.annotation)
        if current is None:
            return None
    return current


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or holds several of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
