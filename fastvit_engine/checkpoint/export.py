"""The trained weights as one safetensors file with timm's names, made from a checkpoint alone."""

import json
import mmap
import sys
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from fastvit_engine.checkpoint import Checkpoint, doubt_about_latest, open_store, usable_checkpoints
from fastvit_engine.checkpoint.format import Manifest
from fastvit_engine.checkpoint.reader import CheckpointReader
from fastvit_engine.checkpoint.run_config import read_section
from fastvit_engine.checkpoint.store import is_step_name
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_writer
from fastvit_engine.models.weights.pretrained import model_config
from fastvit_engine.models.weights.safetensors_file import DTYPES, model_metadata, safetensors_header
from fastvit_engine.models.weights.timm_weights import state_of
from fastvit_engine.observe.disk import insist, is_final, reason
from fastvit_engine.observe.run_folder import RunFolder, run_folder, with_both_slashes
from fastvit_engine.storage.stores import Store, is_store, store_failures
from fastvit_engine.storage.stores import open_store as open_bucket

_CHUNK = 2**23  # bytes
_OF_WEIGHTS = "config.json"  # in folders of transformers and of timm
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it


def find_checkpoint(source: str) -> Checkpoint:
    """The checkpoint that a path or URL names: itself, or the latest of a run folder or of a folder of checkpoints.

    Raises UserError if there is none, or if the run's config.yaml is damaged.
    """
    source = given = with_both_slashes(source)
    parent, _, name = source.rstrip("/").rpartition("/")
    if is_step_name(name):
        return Checkpoint(open_store(parent or "."), name)
    if "://" not in source and Path(source).is_file():
        raise UserError(_without_checkpoint(given, source))
    if "://" not in source or is_store(source):
        run = run_folder(source)
        if (settings := read_section(run, "checkpoint")) is not None:
            source = settings.get("path") or run.checkpoint_location
    store = open_store(source)
    found = usable_checkpoints(store)
    if doubt := doubt_about_latest(store):
        print(f"warning: {doubt}", file=sys.stderr, flush=True)
    if not found:
        raise UserError(_without_checkpoint(given, source))
    return found[0]


def _without_checkpoint(given: str, source: str) -> str:
    """Why there is no checkpoint in `source`, to which `given` has led, and what to do."""
    path, remedy = Path(given), "give a run folder, or a checkpoint such as RUN/checkpoints/step-N"
    if "://" in given:
        return f"{source} holds no checkpoint: {remedy}"
    if not path.exists():
        return f"{source} does not exist: {remedy}"
    if (path / _OF_WEIGHTS).is_file():
        return (
            f"{given} is a folder of weights ({_OF_WEIGHTS}), which holds no checkpoint: `fastvit convert {given} "
            "NEW.safetensors --to timm` writes them to one file"
        )
    if path.suffix in (".npz", ".safetensors") and path.is_file():
        return f"{given} is a file of weights, which holds no checkpoint: `fastvit convert` writes them in other forms"
    if path.is_file():
        return f"{given} is a file, which holds no checkpoint: {remedy}"
    if path.is_dir() and not any(path.iterdir()):
        return f"{given} is an empty folder, which holds no checkpoint: {remedy}"
    if RunFolder(path).config.is_file():
        return f"{source} holds no checkpoint, and {given} is a run without one: start the run again"
    return f"{source} holds no checkpoint: {remedy}"


def export_run(checkpoint: Checkpoint, run: RunFolder) -> None:
    """Writes `model.safetensors` and, with an average, `model_ema.safetensors`, unless they are of this checkpoint.

    For a run at its end, and for one that was killed just before this. A run in an object store gets them there. Raises
    RestartError if the disk is full or lost.
    """
    insist(lambda: _export_run(checkpoint, run), run.describe(run.path / "model.safetensors"))


def _export_run(checkpoint: Checkpoint, run: RunFolder) -> None:
    manifest = checkpoint.read_manifest()
    identity = _identity(manifest)
    for name, kind in (("model.safetensors", "weight"), ("model_ema.safetensors", "ema")):
        if kind not in manifest.kinds or (run.url and _uploaded_from(run.url, name) == identity):
            continue
        if _exported_from(run.path / name) != identity:
            _write_weights(checkpoint, run.path / name, kind)
        if run.url:
            _upload(run.path / name, run.url, name)


def export_weights(checkpoint: Checkpoint, out: Path, kind: str = "weight") -> None:
    """Writes the fp32 weights (kind "weight") or their average ("ema") of a checkpoint, whole, to `out`.

    Needs no process group and no DeepSpeed, and no more memory than the pages of the file in transit. Raises UserError
    if the checkpoint has no average, is damaged, or `out` cannot be written.
    """
    try:
        _write_weights(checkpoint, out, kind)
    except OSError as error:
        remedy = "choose another --out" if is_final(error) else "make room and run the same command again"
        raise UserError(f"{out} could not be written ({reason(error)}): {remedy}") from error


def _write_weights(checkpoint: Checkpoint, out: Path, kind: str) -> None:
    manifest = checkpoint.read_manifest()
    kind_of_weights(checkpoint, manifest, ema=kind == "ema")
    state, shapes, dtypes = manifest.state, dict[str, Sequence[int]](manifest.of_model), dict[str, str]()
    if is_timm(config := model_config(state.fingerprint["model"], str(checkpoint))):
        buffers = manifest.stored("buffer")
        shapes = {name: shape for name, shape in state_of(config).shapes.items() if name in shapes or name in buffers}
        dtypes = {name: slices[0][1].dtype for name, slices in buffers.items() if name in shapes}
    kinds = manifest.kind_of_each(shapes, kind)
    reader, files = CheckpointReader(checkpoint, manifest), _Files(checkpoint, manifest, set(kinds.values()))
    dtypes = {name: dtypes.get(name, "F32") for name in shapes}
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    sizes = {name: count * DTYPES[dtypes[name]].itemsize for name, count in counts.items()}
    described = model_metadata(state.fingerprint["model"], state.pixels, state.class_names, str(checkpoint))
    metadata = {**described, **_identity(manifest)}
    with atomic_writer(out) as file:
        file.write(safetensors_header(dtypes, shapes, sizes, metadata))
        for name, count in counts.items():
            for file_name, tensor in reader.overlapping(kinds[name], name, 0, count):
                file.write(reader.verified(files.content(file_name), file_name, kinds[name], name, tensor))


def kind_of_weights(checkpoint: Checkpoint, manifest: Manifest, *, ema: bool) -> str:
    """The kind of tensors to read. Raises UserError if the checkpoint has no average and it is asked for."""
    if ema and "ema" not in manifest.kinds:
        raise UserError(f"{checkpoint} has no average of the weights (ema.decay was null): leave --ema out")
    return "ema" if ema else "weight"


class _Files:
    """The checkpoint's files in memory, mapped when first needed, as far as some kinds of tensors lie there."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest, kinds: Collection[str]) -> None:
        self._checkpoint, self._manifest, self._kinds = checkpoint, manifest, kinds
        self._mapped: dict[str, mmap.mmap] = {}

    def content(self, file: str) -> mmap.mmap:
        if file not in self._mapped:
            stored = self._manifest.files[file]
            spans = [(t.offset, t.offset + t.nbytes) for kind, _, t in stored.tensors if kind in self._kinds]
            start, stop = min(first for first, _ in spans), max(last for _, last in spans)
            self._mapped[file] = self._checkpoint.store.map(self._checkpoint.name, file, stored.size, start, stop)
        return self._mapped[file]


def _identity(manifest: Manifest) -> dict[str, str]:
    """What tells an export of one checkpoint from another's."""
    checksum = 0
    for file in sorted(manifest.files):
        for _, _, tensor in manifest.files[file].tensors:
            checksum = zlib.crc32(tensor.crc32.to_bytes(4, "little"), checksum)
    return {"step": str(manifest.step), "checkpoint": f"{checksum:08x}"}


def _exported_from(path: Path) -> dict[str, str] | None:
    """The identity that an exported file carries; None if there is no such file, or if it is damaged."""
    try:
        with open(path, "rb") as file:
            return _identity_in(lambda start, stop: file.read(stop - start))
    except FileNotFoundError:
        return None


def _uploaded_from(url: str, name: str) -> dict[str, str] | None:
    """As `_exported_from`, for a file in an object store, of which only the header is read."""
    store, key = _object(url, name)
    try:
        with store_failures(url):
            return _identity_in(lambda start, stop: store.read(key, start, stop))
    except FileNotFoundError:
        return None


def _identity_in(read: Callable[[int, int], bytes]) -> dict[str, str] | None:
    """The identity in a safetensors file; `read` gives its bytes [start, stop), in order."""
    try:
        size = int.from_bytes(read(0, 8), "little")
        header = json.loads(read(8, 8 + size)) if 0 < size <= _LONGEST_HEADER else {}
        return {key: header["__metadata__"][key] for key in ("step", "checkpoint")}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _upload(path: Path, url: str, name: str) -> None:
    store, key = _object(url, name)
    with open(path, "rb") as file, store_failures(url):
        store.write_stream(key, iter(lambda: file.read(_CHUNK), b""))


def _object(url: str, name: str) -> tuple[Store, str]:
    store, folder = open_bucket(url)
    return store, f"{folder}/{name}".lstrip("/")
