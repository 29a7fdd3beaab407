"""Converts released SAIL-VL2 checkpoints to native ones and back; every tensor stays the same bit for bit.

    released: config.json with vision_config and llm_config, vision_model.*, mlp1.*, language_model.*, and remote code
    native:   what SailVL2ForConditionalGeneration.save_pretrained writes, read by the Auto classes and by vLLM

Both are folders of safetensors files, converted file by file (shards.py). Names: released_names.py; configuration:
released_config.py; tokenizer and templates: released_text.py. A release's other files travel inside the native folder
as data (released_files.py). Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint import released_files as files
from core.checkpoint.check import NonFinite, check_code, nonfinite_tensors, shortened
from core.checkpoint.cut import Target, write_targets
from core.checkpoint.released_config import (
    CONFIG,
    PREPROCESSOR,
    different_keys,
    image_processor,
    native_config,
    released_config,
    released_preprocessor,
)
from core.checkpoint.released_names import (
    RELEASED_EMBEDDING,
    RELEASED_HEAD,
    export_targets,
    import_targets,
    links,
)
from core.checkpoint.released_text import (
    CHAT_TEMPLATE,
    TOKENIZER,
    load_tokenizer,
    native_generation_config,
    native_template,
    released_text,
)
from core.checkpoint.shards import (
    Entry,
    LayoutError,
    Progress,
    Tensors,
    copy_own,
    listed,
    printable,
    read_object,
    silent,
)
from core.checkpoint.stream import SHARD_BYTES
from core.files import atomic_dir, sha256_file, write_json
from core.manifest import Began, Manifest, hash_config
from core.model.layout import Shape, native_shapes
from core.model.names import HEAD, MODULES, module_of
from core.model.tokenizer import IMAGE_TOKEN, token_id

if TYPE_CHECKING:
    from core.model.configuration import SailVL2Config

_LAYOUT = 1
"""Version of the conversion. Increase it when the same source gives a different result."""
_VOLATILE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Converted:
    """The result of an import or export, for the terminal."""

    out: Path
    title: str
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Assumptions, changes and omissions of the conversion, one a line."""
    skipped: bool = False
    """Whether the folder existed already, converted from the same source."""

    def text(self) -> str:
        """A few lines for the terminal."""
        if self.skipped:
            return f"{self.out}: exists already, from the same files; nothing to do"
        lines = [self.title, *(f"  {line}" for line in self.lines)]
        if self.notes:
            lines += ["note:", *(f"  - {note}" for note in self.notes)]
        return printable("\n".join([*lines, f"written to {self.out}"]))


@dataclass
class _Import:
    """A release, read and checked, before anything is written."""

    source: Tensors
    released: dict[str, Any]
    """Its config.json."""
    tokenizer: Any
    config: SailVL2Config
    images: Any
    """The native image processor."""
    notes: list[str]


def import_released(
    src: Path,
    dst: Path,
    *,
    any_resolution: bool = False,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Converted:
    """Write the released checkpoint in `src` as a native core to `dst`, whole or not at all.

    Args:
        any_resolution: the release is an AnyRes model. No known key of a release distinguishes these from models that
            cut images into tiles.
        allow_nonfinite: import tensors with NaN or infinity too. Stages and servers refuse such a core.

    Does nothing if `dst` already holds the result for the same files. Raises LayoutError for everything in `src` that
    is unknown, missing, contradictory or unsupported, and if another folder is at `dst`; NonFinite for weights with
    NaN or infinity.
    """
    began = Began()
    src, dst = Path(src), Path(dst)
    _check_places(src, dst, "import")
    read = _read_release(src, any_resolution)
    _check_numbers(read, allow_nonfinite)
    config, notes = read.config, read.notes
    shapes = _shapes(src, config)
    targets = import_targets(links(shapes), read.source, head_is_embedding=bool(config.tie_word_embeddings))
    template = native_template(src, read.tokenizer, notes)
    generation = native_generation_config(src, read.released["llm_config"], read.tokenizer, notes)
    names = files.carried(src)
    notes += _what_is_left(src, names)
    hashes = _hashes(src, [*read.source.files, *names], progress)
    fingerprint = hash_config(
        {"what": "import", "layout": _LAYOUT, "inputs": hashes, "any_resolution": config.any_resolution}
    )
    if _is_finished(dst, "import", fingerprint):
        return Converted(dst, "", skipped=True)
    _check_disk(dst, read.source.nbytes)

    from core.model.processing import SailVL2Processor

    read.tokenizer.chat_template = template
    with atomic_dir(dst) as folder:
        write_targets(
            read.source, targets, folder, max_shard_bytes, progress=progress, allow_nonfinite=allow_nonfinite
        )
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        tokens = int(config.image_seq_length or 0)
        SailVL2Processor(read.images, read.tokenizer, image_seq_length=tokens).save_pretrained(folder)
        files.store(src, names, folder, head_stored=RELEASED_HEAD in read.source)
        _check_loads(folder)
        _write_manifest(folder, "import", fingerprint, hashes, began)
    return Converted(
        dst,
        f"SAIL-VL2 core, {_count(shapes.values())} parameters, {_dtypes(read.source)}",
        [*_parts(shapes), _tiles(read.images, config), f"end of text: {generation.eos_token_id}"],
        notes,
    )


def _read_release(src: Path, any_resolution: bool) -> _Import:
    """Configuration, tokenizer and image processor of a release. Raises LayoutError."""
    if not (src / CONFIG).exists():
        raise LayoutError(f"{src}: no {CONFIG}; give the folder of a released SAIL-VL2 checkpoint")
    released = read_object(src / CONFIG)
    if "llm_config" not in released:
        raise LayoutError(
            f"{src / CONFIG}: model_type={released.get('model_type')!r} without llm_config is not a released SAIL-VL2 "
            "layout" + (", but a native core already" if released.get("model_type") == "sailvl2" else "")
        )
    source, notes = Tensors(src), list[str]()
    if any_resolution:
        released = {**released, "any_resolution": True}
    elif "anyres" in src.resolve().as_posix().lower() and not released.get("any_resolution"):
        notes.append(
            "images are cut into tiles, although the path contains AnyRes; if images must keep their size, give "
            "--any-resolution"
        )
    tokenizer = load_tokenizer(src)
    both = {RELEASED_HEAD, RELEASED_EMBEDDING} <= source.entries.keys()
    with _worded(src):
        config = native_config(
            released,
            source.entries,
            head_is_embedding=both and source.equal(RELEASED_HEAD, RELEASED_EMBEDDING),
            image_token_id=token_id(tokenizer, IMAGE_TOKEN),
            notes=notes,
        )
    if len(tokenizer) > config.text_config.vocab_size:
        raise LayoutError(
            f"{src}: the tokenizer has {len(tokenizer)} tokens, the embedding {config.text_config.vocab_size} rows"
        )
    preprocessor = read_object(src / PREPROCESSOR) if (src / PREPROCESSOR).exists() else {}
    images = image_processor(released, preprocessor, config, notes)
    return _Import(source, released, tokenizer, config, images, notes)


def _check_numbers(read: _Import, allow_nonfinite: bool) -> None:
    broken = nonfinite_tensors(read.source)
    if broken and not allow_nonfinite:
        raise NonFinite(
            listed(f"{read.source.folder}: weights that are not finite", shortened(broken))
            + "\ndownload the files again; --allow-nonfinite imports them unchanged, to inspect them"
        )
    read.notes += [f"not finite: {problem}" for problem in shortened(broken)]


def export_released(
    src: Path,
    dst: Path,
    *,
    like: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Converted:
    """Write the native checkpoint in `src` in the released layout to `dst`, whole or not at all.

    Code, tokenizer and the other files come from the release `like` (or from its import); default: the release from
    which `src` was imported or trained. Without a release they are generated and contain no code. Raises LayoutError
    as `import_released`, and if `src` and the release are different models.
    """
    began = Began()
    src, dst = Path(src), Path(dst)
    _check_places(src, dst, "export")
    config = _read_native(src)
    check_code(src)
    source, notes = Tensors(src), list[str]()
    release = files.Release.of(Path(like) if like else src)
    if like and release is None:
        raise LayoutError(f"{like}: neither a release (config.json with llm_config) nor the import of one")
    shapes = _shapes(src, config)
    # Older code ties a nested language model or not, depending on its version. Both read a checkpoint that stores both.
    copy_head = bool(config.tie_word_embeddings) and (release is None or release.head_stored)
    targets = export_targets(links(shapes), source, copy_head=copy_head)
    home, names, written = _files_of_export(src, release, config, _entries(source, targets), notes)
    hashes = _hashes(src, [*source.files, CONFIG], progress)
    hashes |= {f"release/{name}": sha256_file(home / name) for name in names}
    fingerprint = hash_config(
        {"what": "export", "layout": _LAYOUT, "inputs": hashes, "head": copy_head, "written": written}
    )
    if _is_finished(dst, "export", fingerprint):
        return Converted(dst, "", skipped=True)
    _check_disk(dst, source.nbytes)
    with atomic_dir(dst) as folder:
        write_targets(source, targets, folder, max_shard_bytes, progress=progress)
        for name in (*names, *(() if release else (TOKENIZER, CHAT_TEMPLATE))):
            copy_own(home / name, folder / name, home=src if home.is_relative_to(src) else home)
        for name, values in written.items():
            write_json(folder / name, values)
        _check_written(folder, {target.name: target.shape for target in targets})
        _write_manifest(folder, "export", fingerprint, hashes, began)
    head = "the embedding, stored again" if copy_head else "the embedding, stored once"
    return Converted(
        dst,
        f"SAIL-VL2 in the released layout, {_count(shapes.values())} parameters, {_dtypes(source)}",
        [
            *_parts(shapes),
            *([f"output layer: {head}"] if config.tie_word_embeddings else []),
            f"files of the release: {', '.join(names) or 'none'}",
        ],
        notes,
    )


def _files_of_export(
    src: Path,
    release: files.Release | None,
    config: SailVL2Config,
    entries: Mapping[str, Entry],
    notes: list[str],
) -> tuple[Path, list[str], dict[str, dict[str, Any]]]:
    """Files beside the weights of an export: the folder to copy from, the names to copy, and the files to generate."""
    import core
    from core.model.processing import SailVL2Processor

    core.register()
    processor = SailVL2Processor.from_pretrained(src, trust_remote_code=False)
    images = processor.image_processor
    if release:
        _check_same_tokenizer(src, release.folder)
        return (
            release.folder,
            files.carried(release.folder),
            _changed(release, config, images, entries, notes),
        )
    notes.append("no release is known: the files are generated and contain no code; give a release by --like")
    written = {
        CONFIG: released_config(config, images),
        PREPROCESSOR: released_preprocessor(config, images),
        **released_text(processor.tokenizer, src),
    }
    return src, [path.name for path in files.legal_files(src)], written


def _changed(
    release: files.Release,
    config: SailVL2Config,
    images: Any,
    entries: Mapping[str, Entry],
    notes: list[str],
) -> dict[str, dict[str, Any]]:
    """The release's configuration files that post-training or its user changed, with their current values.

    Raises LayoutError if the release is a different model.
    """
    was = release.config()
    seen = read_object(release.folder / PREPROCESSOR) if (release.folder / PREPROCESSOR).exists() else {}
    with _worded(release.folder):
        then = native_config(
            {**was, "any_resolution": config.any_resolution},
            entries,
            head_is_embedding=bool(config.tie_word_embeddings),
            image_token_id=config.image_token_id,
            notes=[],
        )
    keys = [
        key for key in different_keys(then.to_dict(), config.to_dict()) if key.split(".")[-1] not in _VOLATILE
    ]
    if keys:
        raise LayoutError(
            f"{release.folder}: the release of another model, config.json differs in {', '.join(keys)}; give the "
            "release that this checkpoint was made from by --like"
        )
    now_is, preprocessor = copy.deepcopy(was), dict(seen)
    dtype = released_config(config, images)["torch_dtype"]
    for part in (now_is, now_is["llm_config"], now_is["vision_config"]):
        for key in ("torch_dtype", "dtype"):
            if part.get(key, dtype) != dtype:
                part[key] = dtype
    if now_is != was:
        notes.append(f"{CONFIG}: data type {dtype}, which the weights have now")
    before = released_preprocessor(then, image_processor(was, seen, then, []))
    after = released_preprocessor(config, images)
    for key in different_keys(before, after):
        notes.append(f"{PREPROCESSOR}: {key}={after[key]}, the release has {before[key]}")
        if seen:
            preprocessor[key] = after[key]
        if key in now_is or not seen:
            now_is[key] = after[key]
    files_now = {CONFIG: (was, now_is), PREPROCESSOR: (seen, preprocessor)}
    return {name: new for name, (old, new) in files_now.items() if new != old}


def _check_same_tokenizer(src: Path, release: Path) -> None:
    """Refuse to pair weights with a tokenizer whose ids they were not trained on."""
    if not (release / TOKENIZER).exists():  # vocab.json and merges.txt, from which ours was made
        return
    ours, theirs = (
        {key: read_object(folder / TOKENIZER).get(key) for key in ("model", "added_tokens")}
        for folder in (src, release)
    )
    if keys := different_keys(theirs, ours):
        raise LayoutError(
            f"{src / TOKENIZER}: differs from the release's ({release / TOKENIZER}) in {', '.join(keys[:5])}; released "
            "code would read tokens that the model was not trained on"
        )


def _read_native(src: Path) -> SailVL2Config:
    from core.model.configuration import SailVL2Config

    if not (src / CONFIG).exists():
        raise LayoutError(f"{src}: no {CONFIG}; give the folder of a native checkpoint")
    values = read_object(src / CONFIG)
    if values.get("model_type") != SailVL2Config.model_type:
        raise LayoutError(
            f"{src / CONFIG}: model_type={values.get('model_type')!r}; a native core has "
            f"{SailVL2Config.model_type!r}" + (", this is a release" if "llm_config" in values else "")
        )
    with _worded(src):
        return SailVL2Config.from_dict(values)


def _shapes(src: Path, config: SailVL2Config) -> dict[str, Shape]:
    with _worded(src):
        return native_shapes(config)


@contextmanager
def _worded(src: Path) -> Iterator[None]:
    """Turn every error that transformers raises for untrusted values into a LayoutError with the file's name."""
    try:
        yield
    except LayoutError:
        raise
    except Exception as error:
        raise LayoutError(f"{src / CONFIG}: does not describe a SAIL-VL2 model: {error}") from error


def _check_places(src: Path, dst: Path, what: str) -> None:
    if not src.is_dir():
        raise LayoutError(f"{src}: no such folder")
    if dst.resolve().is_relative_to(src.resolve()):
        raise LayoutError(f"{dst}: lies in {src}; {what} to a folder outside it")
    if dst.exists() and not dst.is_dir():
        raise LayoutError(f"{dst}: is a file; give a folder that does not exist")
    if dst.exists() and Manifest.read(dst) is None and any(dst.iterdir()):
        raise LayoutError(f"{dst}: exists already and was not written by an {what}; give another folder")


def _is_finished(dst: Path, what: str, fingerprint: str) -> bool:
    found = Manifest.read(dst)
    if found is None:
        return False
    if (found.stage, found.fingerprint) != (what, fingerprint):
        raise LayoutError(f"{dst}: exists already, from other files; remove it or give another folder")
    return True


def _check_disk(dst: Path, needed: int) -> None:
    home = next(folder for folder in dst.resolve().parents if folder.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise LayoutError(f"{home}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed for {dst.name}")


def _check_written(folder: Path, expected: Mapping[str, Shape]) -> None:
    """Open the written files as readers will; a difference is a bug of this project."""
    found = {name: entry.shape for name, entry in Tensors(folder).entries.items()}
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise LayoutError(listed(f"{folder}: the copy differs from the plan; please report this", wrong))


def _check_loads(folder: Path) -> None:
    """Check that the native folder's configuration matches its tensors, and that its processor loads."""
    import core
    from core.model.configuration import SailVL2Config
    from core.model.processing import SailVL2Processor

    core.register()
    _check_written(folder, native_shapes(SailVL2Config.from_pretrained(folder)))
    SailVL2Processor.from_pretrained(folder, trust_remote_code=False)


def _hashes(folder: Path, names: Sequence[str], progress: Progress) -> dict[str, str]:
    sizes = {name: (folder / name).stat().st_size for name in names}
    done, total, hashes = 0, sum(sizes.values()), {}
    for name, size in sizes.items():
        progress("hashing", done, total)
        hashes[name] = sha256_file(folder / name)
        done += size
    progress("hashing", done, total)
    return hashes


def _write_manifest(folder: Path, what: str, fingerprint: str, inputs: dict[str, str], began: Began) -> None:
    began.manifest(
        stage=what,
        fingerprint=fingerprint,
        config_hash=hash_config(read_object(folder / CONFIG)),
        inputs=inputs,
    ).write(folder)


def _entries(source: Tensors, targets: Sequence[Target]) -> dict[str, Entry]:
    """The tensors that an export will hold, as entries of its files."""
    return {
        target.name: Entry("export", source.entries[target.pieces[0].name].dtype, target.shape)
        for target in targets
    }


def _what_is_left(src: Path, names: Sequence[str]) -> list[str]:
    notes = []
    if left := files.left_behind(src):
        notes.append(f"files that are not copied: {', '.join(left)}")
    if not any(files.legal(name) for name in names):
        notes.append("the release has no licence file; read the model card before you pass the core on")
    return notes


def _parts(shapes: Mapping[str, Shape]) -> list[str]:
    """A line per part with its parameters; a stored output layer has its own line."""
    lines = []
    for part in (*MODULES, "output layer"):
        held = [
            shape
            for name, shape in shapes.items()
            if ("output layer" if name == HEAD else module_of(name)) == part
        ]
        if held:
            lines.append(f"{part.replace('_', ' ') + ':':16} {_count(held):>9}")
    return lines


def _count(shapes: Iterable[Shape]) -> str:
    count = sum(prod(shape) for shape in shapes)
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count:,}"


def _dtypes(source: Tensors) -> str:
    return ", ".join(sorted({entry.dtype for entry in source.entries.values()}))


def _tiles(images: Any, config: SailVL2Config) -> str:
    side, tokens = config.vision_config.image_size, config.image_seq_length
    if config.any_resolution:
        block = 2 * config.vision_config.patch_size
        return (
            f"images: of any size up to {images.size['longest_edge']} px, one token for {block} by {block} px"
        )
    if not images.crop_to_patches:
        return f"images: one tile of {side} px, {tokens} tokens"
    thumbnail = "with a thumbnail where there are several" if images.use_thumbnail else "without a thumbnail"
    scales = ", at two scales" if images.use_msac else ""
    tiles = f"{images.min_patches} to {images.max_patches} tiles of {side} px{scales}"
    return f"images: {tiles}, {tokens} tokens each, {thumbnail}"
