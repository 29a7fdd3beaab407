"""The templates of the pages, and the interactive page: its content security policy, its scripts and its data.

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

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def interactive(title: str, content: Mapping[str, Any], *, live: bool = False) -> str:
    """The page that shows `content`; `live` permits it to ask its own server for newer content."""
    from markupsafe import Markup

    script = "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (HERE / "report.css").read_text(encoding="utf-8")
    # These three texts are ours, or escaped here; the template must not escape them again.
    return template("page.html.jinja").render(
        title=title,
        policy=policy(script, style, live),
        data=Markup(script_json(content)),
        script=Markup(script),
        style=Markup(style),
    )


def policy(script: str, style: str, live: bool = False) -> str:
    """The content security policy of a page with exactly this script and this style."""
    rules = [
        "default-src 'none'",
        f"script-src '{_hash(script)}'",
        f"style-src '{_hash(style)}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return "; ".join([*rules, "connect-src 'self'"] if live else rules)


def script_json(value: Any) -> str:
    """JSON that cannot end the script element around it; ASCII. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
