"""README and docs show only what works: links, snippets, commands, keys and figures."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from chain import reference
from chain.cli.main import parser
from chain.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {ROOT / "docs" / "recipe-reference.md"}
"""Pages that docs/hooks.py makes when the docs are built."""
EXCUSED_AT_MOST = 6
"""Python snippets that do not run. Raise it only with a reason on the snippet's page."""
EXCUSE = re.compile(r"<!-- not run: \S.*-->")
BLOCK = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}


def blocks(page: Path, *languages: str):
    """(line, text, excused) of each fenced block in one of these languages; "" is a block without one."""
    for found in BLOCK.finditer(TEXT[page]):
        if found.group(1) in languages:
            before = TEXT[page][: found.start()].rstrip("\n").rpartition("\n")[2]
            line = TEXT[page].count("\n", 0, found.start()) + 1
            yield line, found.group(2), bool(EXCUSE.fullmatch(before.strip()))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: headings, in lower case, with hyphens."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", TEXT[page]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", TEXT[page])):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file in GENERATED:
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_the_readme_is_short_and_its_files_exist():
    readme = TEXT[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 150
    shown = re.findall(r"`((?:chain|core|corpus|rl|sft|rewards|recipes|benchmarks)/[\w./]*)`", readme)
    assert len(shown) > 20
    assert [path for path in shown if not (ROOT / path).exists()] == []


def pages_with_python():
    return [page for page in PAGES if any(not excused for _, _, excused in blocks(page, "python"))]


@pytest.mark.parametrize("page", pages_with_python(), ids=name)
def test_python_snippets_run(page, tmp_path, monkeypatch):
    """The snippets of a page run in order, in one empty folder; later ones see the names of earlier ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    names = {"__name__": "snippet"}
    for line, text, excused in blocks(page, "python"):
        if not excused:
            exec(compile("\n" * line + text, str(page), "exec"), names)


def test_few_snippets_are_excused():
    excused = [(name(page), line) for page in PAGES for line, _, excuse in blocks(page, "python") if excuse]
    assert len(excused) <= EXCUSED_AT_MOST, excused


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of every call of `program` in a block of shell lines."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # a drawing, or a line of output
        starts = [place for place, word in enumerate(words) if word.rpartition("/")[2] == program]
        if not starts:
            continue
        arguments = words[starts[0] + 1 :]
        ends = [place for place, word in enumerate(arguments) if word in ("|", ">", "&&", ";", "&")]
        found.append(arguments[: ends[0]] if ends else arguments)
    return found


SHOWN = [
    pytest.param(arguments, id=f"{name(page)}:{line}:{' '.join(arguments[:2])}")
    for page in PAGES
    for line, text, _ in blocks(page, "", "sh", "bash", "console", "shell")
    for arguments in commands(text, "posttrain")
]


@pytest.mark.parametrize("arguments", SHOWN)
def test_shown_commands_parse(arguments):
    parser().parse_args(arguments)


def test_commands_in_running_text_exist():
    known = parser().format_help()
    shown = {
        (name(page), found)
        for page in PAGES
        for found in re.findall(r"`posttrain ([a-z][a-z-]*)", TEXT[page])
    }
    assert shown
    assert [
        found for found in shown if f"\n    {found[1]} " not in known and f"{found[1]}\n" not in known
    ] == []


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {word for line in targets for word in line.split()}
    shown = {
        word for page in PAGES for word in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", TEXT[page], re.MULTILINE)
    }
    assert {"demo", "test", "check"} <= shown
    assert shown <= known


def fits(value, models) -> bool:
    """Whether the keys of a mapping, or of the mappings in a list, are keys of one of the models."""
    if isinstance(value, list):
        return all(fits(one, models) for one in value)
    if not isinstance(value, dict) or not models:
        return True
    return any(
        all(key in keys and fits_key(inner, keys[key]) for key, inner in value.items())
        for keys in ({key.name: key for key in reference.keys_of(model)} for model in models)
    )


def fits_key(value, key) -> bool:
    values = value.values() if key.named and isinstance(value, dict) else [value]
    return all(fits(one, key.models) for one in values)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_shows_keys_that_recipes_have(page):
    models = [section.model for section in reference.sections()]
    for line, text, _ in blocks(page, "yaml"):
        shown = yaml.safe_load(text) or {}
        shown.pop("extends", None)
        assert fits(shown, models), f"{name(page)}:{line}: no part of a recipe has these keys: {shown}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "stages").glob("*.md")), ids=name)
def test_the_stage_pages_give_the_recipes_numbers(page):
    recipe = load_recipe(ROOT / "recipes" / "sailvl2_2b").model_dump(mode="json")
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (\S+) \|$", TEXT[page], re.MULTILINE)
    assert len(rows) >= 4
    for path, shown in rows:
        value = recipe
        for part in path.split("."):
            if isinstance(value, list) and not part.isdigit():  # a reward, by its name
                value = next(term for term in value if term["name"] == part)
            else:
                value = value[int(part)] if part.isdigit() else value[part]
        assert (float(shown) if isinstance(value, int | float) else shown) == value, path
