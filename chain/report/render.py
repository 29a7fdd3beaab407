"""The templates of the pages, their content security policy, and the interactive page with its scripts and its data.

Completions come from a model. The templates escape every value. The interactive page carries its data as JSON, which
its scripts show as text. Its policy permits these scripts and styles by their hashes, and no request at all; it also
forbids the browser to parse any string as HTML (Trusted Types).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "charts.js", "choosing.js", "questions.js", "stages.js", "page.js")
"""The page's scripts, in the order in which they are joined."""


def template(name: str) -> Any:
    """The Jinja template of that name in this folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style = (HERE / "report.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The stylesheet is ours; the template must not escape it.
    environment.globals |= {"style": Markup(style), "policy": policy(style)}
    return environment.get_template(name)


def interactive(title: str, content: Mapping[str, Any], *, live: bool = False) -> str:
    """The page that shows `content`; `live` permits it to ask its own server for newer content."""
    from markupsafe import Markup

    script = "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = template("page.html.jinja")
    # Both texts are ours, or escaped here; the template must not escape them again.
    return page.render(
        title=title,
        policy=policy(str(page.globals["style"]), script, live),
        data=Markup(script_json(content)),
        script=Markup(script),
    )


def policy(style: str, script: str = "", live: bool = False) -> str:
    """The content security policy of a page with exactly this style and this script."""
    rules = [
        "default-src 'none'",
        f"style-src '{_hash(style)}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
        *([f"script-src '{_hash(script)}'"] if script else []),
        *(["connect-src 'self'"] if live else []),
    ]
    return "; ".join(rules)


def script_json(value: Any) -> str:
    """JSON that cannot end the script element around it; ASCII. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
