"""The origin of everything in a run: inputs with their hashes, commit, versions, time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chain.display import duration
from core.manifest import Manifest


def lineage(run_dir: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per finished folder of a run: the generated and imported sets, then each stage after its own sets.

    Entries are `{"name", "from", "facts": [(name, value)], "inputs": [(name, hash)], "differs": [text]}`. `differs`
    names the package versions that are not those of the entry before.
    """
    entries, before = [], None
    for name, manifest in _manifests(run_dir, stages):
        facts = [
            ("fingerprint", manifest.fingerprint),
            ("configuration", manifest.config_hash),
            ("commit", manifest.commit or "unknown"),
            ("seed", str(manifest.seed)),
            ("started", manifest.started),
            ("finished", manifest.finished),
            ("took", duration(manifest.seconds)),
        ]
        entries.append(
            {
                "name": name,
                "from": manifest.parent or "",
                "facts": facts,
                "inputs": list(manifest.inputs.items()),
                "differs": _differences(before, manifest.versions) if before is not None else [],
            }
        )
        before = manifest.versions
    return entries


def _manifests(run_dir: Path, stages: Sequence[str]) -> Iterator[tuple[str, Manifest]]:
    folders = [("generated sets", run_dir / "data")]
    folders += [(f"imported set {one.name}", one) for one in sorted((run_dir / "imported").glob("*"))]
    for stage in stages:
        folders += [(f"sets of {stage}", run_dir / "prepared" / stage), (stage, run_dir / stage)]
    for name, folder in folders:
        if manifest := Manifest.read(folder):
            yield name, manifest


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{name} {before.get(name, 'missing')} → {now.get(name, 'missing')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
