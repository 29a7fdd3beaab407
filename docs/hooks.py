"""mkdocs calls this: it adds the page and the schema that are made from the configuration models."""

import json
from typing import Any

from mkdocs.structure.files import File, Files

from chain import reference


def on_files(files: Files, config: Any) -> Files:
    """Add recipe-reference.md and recipe.schema.json to what is built."""
    files.append(File.generated(config, "recipe-reference.md", content=reference.markdown()))
    schema = json.dumps(reference.schema(), indent=2)
    files.append(File.generated(config, "recipe.schema.json", content=schema))
    return files
