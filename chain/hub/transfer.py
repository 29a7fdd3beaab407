"""`posttrain push` and `posttrain pull`: one commit to the hub, and one checked folder from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from chain.hub.card import card, released
from core.checkpoint.check import check_checkpoint
from core.files import PARTIAL, read_json
from core.strict import ConfigError

CARD = "README.md"
_LEFT_OUT = ("start.json", "adapter")
"""Parts of a checkpoint folder that name local paths or are not the model."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf")
"""Files that are not fetched: reading a pickle runs code, and no stage reads the other formats."""


class HubError(RuntimeError):
    """The hub refused, does not know the repository, or was not reached. One line."""


def push(
    run: Path,
    repo: str,
    *,
    licence: str,
    stage: str | None = None,
    base_model: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Push a stage's checkpoint with its card in one commit; return the card. With `dry_run`, only show both.

    Raises ConfigError for an unfinished stage, an error of core.checkpoint.check for a checkpoint that nobody should
    load, and HubError.
    """
    what = released(run, stage)
    check_checkpoint(what.checkpoint)
    text = card(what, repo, licence, base_model)
    files = [
        path
        for path in sorted(what.checkpoint.rglob("*"))
        if path.is_file() and _goes_out(path, what.checkpoint)
    ]
    size = sum(path.stat().st_size for path in files)
    if dry_run:
        say(text)
        for path in files:
            say(f"{path.stat().st_size:>14,}  {path.relative_to(what.checkpoint)}")
    say(
        f"{repo}: {what.stage} of {run}, {len(files)} files, {size / 1e9:.3f} GB, and the card"
        + (" (dry run: nothing was sent)" if dry_run else "")
    )
    if dry_run:
        return text
    from huggingface_hub import CommitOperationAdd, HfApi

    with _one_line(repo):
        api = HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(CARD, text.encode())]
        operations += [
            CommitOperationAdd(path.relative_to(what.checkpoint).as_posix(), path) for path in files
        ]
        commit = api.create_commit(
            repo, operations, commit_message=f"{what.stage} of {what.report.recipe}, seed {what.report.seed}"
        )
    say(f"pushed: {commit.commit_url}")
    return text


def pull(
    repo: str,
    folder: Path,
    *,
    revision: str | None = None,
    any_resolution: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Bring a core from the hub to a new folder: a native core as it is, a released one imported.

    An interrupted download is resumed. Raises ConfigError if the folder exists, HubError, and the errors of
    core.checkpoint.check and of core.checkpoint.released for what may not be loaded.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already; name a new folder, or remove it")
    from huggingface_hub import snapshot_download

    fetched = folder.with_name(f"{folder.name}.download{PARTIAL}")
    with _one_line(repo):
        snapshot_download(repo, revision=revision, local_dir=fetched, ignore_patterns=list(PICKLES))
    shutil.rmtree(fetched / ".cache", ignore_errors=True)
    if not (fetched / "config.json").is_file():
        raise ConfigError(f"{repo}: this is not a core: config.json is missing (fetched to {fetched})")
    if read_json(fetched / "config.json").get("model_type") == "sailvl2":
        check_checkpoint(fetched)
        fetched.rename(folder)
    else:
        from core.checkpoint.released import import_released

        say(import_released(fetched, folder, any_resolution=any_resolution).text())
        shutil.rmtree(fetched)
    say(f"core: {folder}")
    return folder


def _goes_out(path: Path, checkpoint: Path) -> bool:
    """Whether a file is part of the model and lies in the folder: a link out of it could carry a private file out."""
    inner = path.relative_to(checkpoint)
    return inner.parts[0] not in _LEFT_OUT and path.resolve().is_relative_to(checkpoint)


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """Errors of the hub's client as HubError: the first line says what happened."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from requests import RequestException

    try:
        yield
    except (HfHubHTTPError, HFValidationError, RequestException, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise HubError(f"{repo}: {lines[0] if lines else type(error).__name__}") from error
