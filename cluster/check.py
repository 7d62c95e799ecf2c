"""Checks a cluster file before it costs anything.

    python cluster/check.py cluster/aws.yaml

For AWS: Ray's own schema, the names, types and values of every field of `node_config` as botocore knows them, and
what is left to fill in. Exit code 2 and one line for each problem. It needs neither keys nor a network, so it cannot
tell whether an image, a role or a price exists.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PLACEHOLDERS = ("REPLACE_ME", "ACCOUNT", "BUCKET-OF-")


def placeholders(value: Any, at: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from placeholders(inner, f"{at}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from placeholders(inner, f"{at}[{i}]")
    elif isinstance(value, str) and any(word in value for word in PLACEHOLDERS):
        yield f"{at}: {value!r} is to be filled in; docs/cluster.md says how"


def values(value: Any, shape: Any, at: str) -> Iterator[str]:
    """Values that are in no list of allowed ones, which botocore does not check."""
    if shape.type_name == "structure" and isinstance(value, dict):
        for name, inner in value.items():
            if name in shape.members:
                yield from values(inner, shape.members[name], f"{at}.{name}")
    elif shape.type_name == "list" and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from values(inner, shape.member, f"{at}[{i}]")
    elif shape.type_name == "string" and getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{at}: AWS knows no {value!r}"


def node(config: dict[str, Any], at: str) -> Iterator[str]:
    """Problems of a `node_config`, which becomes a call of RunInstances."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    asked = {name: value for name, value in config.items() if name != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(asked, shape)
    if report.has_errors():
        yield from (f"{at}: {line}" for line in report.generate_report().splitlines())
    yield from values(asked, shape, at)
    if "IamInstanceProfile" not in config:
        yield f"{at}: without IamInstanceProfile the node has no right to read S3"
    if "ImageId" not in config:
        yield f"{at}: without ImageId Ray takes an image of 2021"


def problems(path: str | Path) -> list[str]:
    """What is wrong with an AWS cluster file; empty if nothing."""
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    config = yaml.safe_load(Path(path).read_text())
    if not isinstance(config, dict) or not isinstance(config.get("available_node_types"), dict):
        return ["it is no cluster file: it has no available_node_types"]
    found = list(placeholders(config))
    try:
        validate_config(config)
    except jsonschema.ValidationError as error:
        found.append(f"{'.'.join(map(str, error.absolute_path))}: {error.message}")
    except ValueError as error:
        found.append(str(error))
    for name, kind in config["available_node_types"].items():
        found += node(kind.get("node_config", {}), f"available_node_types.{name}.node_config")
        if kind.get("min_workers", 0) > kind.get("max_workers", config.get("max_workers", 0)):
            found.append(f"available_node_types.{name}: min_workers is above max_workers")
    if config.get("head_node_type") not in config["available_node_types"]:
        found.append(f"head_node_type: there is no type {config.get('head_node_type')!r}")
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python cluster/check.py cluster/aws.yaml")
    found = problems(sys.argv[1])
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        sys.exit(2)
    print(f"{sys.argv[1]}: no problem found")


if __name__ == "__main__":
    main()
