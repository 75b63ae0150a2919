"""Every config field is documented, and read by code outside the config layer."""

import ast
import json
from typing import get_args

from pydantic import BaseModel

from megascale.config.cluster import ClusterConfig, ContainerConfig
from megascale.config.dump import json_schema
from megascale.config.schema import RunConfig
from tests.architecture.test_layers import ROOT, module_name, sources, tree


def sections(model: type[BaseModel], prefix: str = ""):
    """(dotted key, field) of every field of a section and the sections inside it."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind, f"{prefix}{name}.")


def all_fields():
    """(dotted key, field) of a run's config and of a cluster's file."""
    yield from sections(RunConfig)
    yield from sections(ClusterConfig, "cluster.")
    yield from sections(ContainerConfig, "cluster.container.")


def test_every_field_is_documented():
    for key, field in all_fields():
        assert field.description, f"{key} has no docstring"
        assert field.description.rstrip().endswith("."), f"{key}: a sentence ends with a full stop"


def test_every_field_is_used():
    """A field that nothing reads is a promise not kept. Attribute access by its name counts as a use, and so does its
    name as a text in the table of floors, from which the preflight reads it by getattr."""
    uses = {
        node.attr
        for path in sources()
        if not module_name(path).startswith("megascale.config.")
        or path.stem in {"validate", "derive", "dump", "model"}
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
    }
    floors = tree(ROOT / "launcher" / "supervise" / "preflight_judge.py")
    uses |= {node.value for node in ast.walk(floors) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    unused = [key for key, _ in all_fields() if key.rpartition(".")[2] not in uses]
    assert not unused, f"nothing reads {unused}"


def test_the_schema_in_the_repository_is_current():
    """`megascale schema` writes it; an editor's completion must not lie."""
    committed = (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert json.loads(committed) == json.loads(json_schema()), "run: megascale schema > configs/schema.json"
