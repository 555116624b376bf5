"""Conversion between YAML and configuration dataclasses, strict about keys, types and ranges.

Errors about an unknown key, a wrong type or a value out of range name the file, the line and the key, and for an
unknown key the nearest spelling. Only plain YAML is read (safe loader).
"""

import dataclasses
import difflib
import os
import types
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf.config import DistConfig, PipelineRun, RunConfig
from rlhf.errors import UserError
from rlhf.io.files import read_text
from rlhf.stages import pipeline_type

_Config = TypeVar("_Config")
_MERGE = "tag:yaml.org,2002:merge"


def load_config(name: str, *, flag: str = "--config") -> PipelineRun:
    """Return the configuration in a YAML file or a preset of the package (`demo`, `gpt2`, …), over the defaults.

    The file may have sections for stages that are not run.

    Args:
        name: the file or preset.
        flag: the flag that named it, for errors.

    Raises:
        UserError: there is no such file or preset, or its content is invalid.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        text = read_text(path)
        if not text.strip():
            raise UserError(f"{flag} {name}: the file is empty")
    elif path.is_dir() and name:
        raise UserError(f"{flag} {name}: is a folder, expected a YAML file")
    else:
        shipped = {
            entry.name.removesuffix(".yaml"): entry
            for entry in resources.files("rlhf.configs").iterdir()
            if entry.name.endswith(".yaml")
        }
        if path.name.removesuffix(".yaml") not in shipped or str(path.parent) not in (".", "configs"):
            raise UserError(f"{flag} {name}: no such file; presets that ship with rlhf: {', '.join(sorted(shipped))}")
        text = shipped[path.name.removesuffix(".yaml")].read_text(encoding="utf-8")
    return parse_config(text, source=name)


def parse_config(text: str, *, source: str) -> PipelineRun:
    """Return the configuration in a YAML text, over the defaults.

    Args:
        text: YAML with the sections of a configuration.
        source: name of the text in errors, such as its file.

    Raises:
        UserError: the text is not YAML, or a key, type or value is invalid.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return pipeline_type()() if node is None else _section(pipeline_type(), node, "", source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{source}: {line}not valid YAML ({getattr(error, 'problem', error)})") from error
    except RecursionError:
        raise UserError(f"{source}: not readable as YAML: its lists or mappings are nested too deeply") from None


def narrow(config: RunConfig, kind: type[_Config]) -> _Config:
    """Return a `kind` with the fields of `config`."""
    return kind(**{spec.name: getattr(config, spec.name) for spec in dataclasses.fields(kind)})  # type: ignore[arg-type]


def dump_config(config: RunConfig) -> str:
    """Return a YAML text from which `parse_config` makes the same configuration."""
    plain = _plain(config)
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if any(character in text for character in "\x85\u2028\u2029\ufeff"):  # not preserved unless escaped
        return yaml.safe_dump(plain, sort_keys=False)
    return text


def load_dist_config(name: str) -> DistConfig:
    """Return the `dist` section of a YAML file or preset that has no other settings.

    Raises:
        UserError: there is no such file or preset, its content is invalid, or it has other settings.
    """
    config = load_config(name, flag="--dist-config")
    if config != type(config)(dist=config.dist):
        raise UserError(f"--dist-config {name}: has settings outside of dist; give such a file to --config")
    return config.dist


def _section(kind: type[_Config], node: yaml.Node, prefix: str, source: str) -> _Config:
    """Build a dataclass from a mapping node."""
    where = f"{source}: line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys to values")
    hints = get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for key_node, value_node in _entries(node, source):
        line = f"{source}: line {key_node.start_mark.line + 1}"
        key = str(getattr(key_node, "value", ""))
        name = key.replace("-", "_")
        if name not in hints:
            raise UserError(f"{line}: unknown key {prefix}{key}; {_remedy(name, hints, prefix)}")
        if name in values:
            raise UserError(f"{line}: {prefix}{key} is set twice; keep one")
        hint_type = hints[name]
        if isinstance(hint_type, type) and dataclasses.is_dataclass(hint_type):
            values[name] = _section(hint_type, value_node, f"{prefix}{name}.", source)
        else:
            values[name] = _leaf(hint_type, value_node, f"{line}: {prefix}{name}")
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{where}: {prefix}{error}") from error


def _entries(node: yaml.MappingNode, source: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the keys and values of a mapping; those of its merge keys (`<<: *common`) are defaults."""
    merges = [value for key, value in node.value if key.tag == _MERGE]
    entries = [(key, value) for key, value in node.value if key.tag != _MERGE]
    for merge in merges:
        for merged in merge.value if isinstance(merge, yaml.SequenceNode) else [merge]:
            if not isinstance(merged, yaml.MappingNode):
                line = merge.start_mark.line + 1
                raise UserError(f"{source}: line {line}: << takes a mapping such as *common, or a list of mappings")
            names = {_key(key) for key, _ in entries}
            entries += [(key, value) for key, value in _entries(merged, source) if _key(key) not in names]
    return entries


def _key(node: yaml.Node) -> str:
    return str(getattr(node, "value", "")).replace("-", "_")


def _remedy(name: str, hints: dict[str, Any], prefix: str) -> str:
    """Return the remedy for an unknown key: a key of another section, or the nearest spelling."""
    below, _, inner = name.rpartition(".")
    sections = [section for section, kind in hints.items() if inner in getattr(kind, "__dataclass_fields__", {})]
    if below in (*sections, ""):
        owners = [below] if below else sections
        if owners:
            return f"it is a key of {' or '.join(owners)}: write `{owners[0]}: {{{inner}: …}}`"
    close = difflib.get_close_matches(name, hints, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(hints)}"


def _leaf(hint: Any, node: yaml.Node, where: str) -> Any:
    """Return a scalar or list as the annotated type."""
    try:
        value = yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({getattr(error, 'problem', error)})") from error
    options = _options(hint)
    if isinstance(value, bool) and any(get_origin(option) is Literal for option in options):
        value = node.value  # as written: YAML takes a bare on or off for a boolean
    for option in options:
        is_valid, result = _convert(option, value)
        if is_valid:
            return result
    raise UserError(f"{where} must be {' or '.join(map(_describe, options))}, got {value!r}")


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of an annotation, without ranges."""
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(option for part in get_args(hint) for option in _options(part))
    return (hint,)


def _convert(option: Any, value: Any) -> tuple[bool, Any]:
    """Return (whether `value` is valid, the converted value); the texts 1e-3 and inf of YAML are valid numbers."""
    if option is type(None):
        return value is None, None
    if option is bool:
        return isinstance(value, bool), value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if option is float:
        try:
            return not isinstance(value, bool) and value is not None, float(value)
        except (TypeError, ValueError, OverflowError):
            return False, None
    if option is Path:
        is_valid = isinstance(value, str) and value != "" and "\0" not in value
        return is_valid, Path(value) if is_valid else None
    if get_origin(option) is Literal:
        return value in get_args(option), value
    if get_origin(option) is tuple:
        items = value if isinstance(value, list) else [value]
        if get_args(option)[0] is not Path:
            return all(isinstance(item, str) for item in items), tuple(items)
        converted = [_convert(Path, item) for item in items]
        return bool(items) and all(is_valid for is_valid, _ in converted), tuple(path for _, path in converted)
    return isinstance(value, option), value


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return "one of " + ", ".join(map(str, get_args(option)))
    if get_origin(option) is tuple:
        return "a list of paths" if get_args(option)[0] is Path else "a list of texts"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
        type(None): "null",
    }
    return names[option]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {spec.name: _plain(getattr(value, spec.name)) for spec in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
