"""The templates of the pages. They escape every value, because completions come from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def template(name: str) -> Any:
    """The Jinja template of that name in this folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
