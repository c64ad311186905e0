"""Documents of a hub dataset, stored as parquet shards in the cache.

The files are streamed with `datasets`, one row group at a time, as far as the preset needs. The metadata of a shard
record where in the stream the next one starts, so that an interrupted fetch resumes after its last whole shard; the
manifest is written last. A complete copy is used without contacting the hub, at the revision recorded when the fetch
began: remove the folder to fetch a newer one. Temporary failures are retried, others raise a UserError. huggingface_hub
reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE once, on import; it is imported only if there is something to fetch.

Memory: one shard's text, the largest compressed row group, and 16 bytes per validation document. Not covered:
fetching several files at once, files other than parquet.
"""

import hashlib
import io
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from lab import network
from lab.data.documents import check_column, digest, read_documents
from lab.errors import UserError, one_line
from lab.files import cache_root, sha256, write_atomic
from lab.preset import Data

FORMAT = 1  # of the shards
SHARD_BYTES = 16_000_000  # text in a shard
VAL_FETCH_BYTES = 8_000_000  # text fetched from whole validation files, or val_bytes if that is more
DELAYS = (1.0, 2.0, 4.0)  # seconds before each retry, on top of huggingface_hub's own 23 s for file content
TIMEOUT = 10.0  # seconds without a response from the hub
ALTERNATIVE = "or work without the hub: PRESET=offline or FILES='folder/*.parquet'"
BLOCK_BYTES = 1 << 16  # read ahead of what parquet asks for: the next row group would fetch it again

Progress = Callable[[str, int, int], None]  # label, bytes of text done, total bytes


class Kept(NamedTuple):
    """A complete local copy: its identity, and its shards in order."""

    identity: dict[str, Any]
    train: list[str]
    val: list[str]


@dataclass(frozen=True)
class Split:
    """The part of the hub's files that is training or validation text."""

    name: str  # train or val
    files: tuple[str, ...]
    first: int = 0  # first row of files[0] that belongs to it
    stop: int | None = None  # first row of files[0] after it
    limit: int | None = None  # most bytes of text


@dataclass
class Place:
    """Where in the stream a shard ends, stored in its metadata: the next row to read, and the totals before it."""

    revision: str  # commit of the repository
    file: int = 0  # index of the file
    row: int = 0  # row of that file
    state: dict[str, Any] | None = None  # of the IterableDataset before that row
    documents: int = 0
    bytes: int = 0
    done: bool = False


def fetch(data: Data, progress: Progress) -> Kept:
    """The local copy of the documents of a hub preset; missing ones are fetched. Raises UserError."""
    if not data.train_files or not data.val_files:
        raise UserError(f"{data.repo}: a hub preset needs train_files and val_files; add them to [data]")
    request = {**asdict(data), "val_bytes": max(VAL_FETCH_BYTES, data.val_bytes), "format": FORMAT}
    folder = cache_root() / "text" / hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]
    manifest = _complete(folder, progress) or _fetch(folder, data, progress)
    train, val = ([str(folder / shard["name"]) for shard in manifest[split]] for split in ("train", "val"))
    return Kept(manifest["identity"], train, val)


def _complete(folder: Path, progress: Progress) -> dict[str, Any] | None:
    """The manifest of a complete, undamaged copy, or None. Damaged shards are removed, to be fetched again."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards = [(folder / shard["name"], shard["sha256"]) for shard in manifest["val"] + manifest["train"]]
        if "identity" not in manifest or any(shard.parent != folder for shard, _ in shards):
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    damaged = [shard for shard, digest in shards if not shard.exists() or sha256(shard) != digest]
    for shard in damaged:
        progress(f"{shard.name} is damaged: fetching it again", 0, 0)
        shard.unlink(missing_ok=True)
    return None if damaged else manifest


def _fetch(folder: Path, data: Data, progress: Progress) -> dict[str, Any]:
    """Fetch validation text, then training text without those documents. Both resume an earlier fetch."""
    limit = max(VAL_FETCH_BYTES, data.val_bytes)
    val = Split("val", data.val_files, limit=limit)
    if any(data.val_documents):
        val = Split("val", data.val_files[:1], *data.val_documents)
    train = Split("train", data.train_files, data.train_from, limit=data.train_bytes)
    val_shards, place = _fetch_split(folder, data, val, "", set(), progress)
    held_out = {digest(text) for text in read_documents([str(folder / shard["name"]) for shard in val_shards], "text")}
    train_shards, place = _fetch_split(folder, data, train, place.revision, held_out, progress)
    read = {"val": asdict(val), "train": {**asdict(train), "files": train.files[: place.file + 1]}}
    identity = {"source": "hub", "repo": data.repo, "revision": place.revision, "field": data.text_field, **read}
    manifest = {"identity": identity, "val": val_shards, "train": train_shards}
    _put(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def _fetch_split(
    folder: Path, data: Data, split: Split, revision: str, excluded: set[bytes], progress: Progress
) -> tuple[list[dict[str, str]], Place]:
    """Name and digest of every shard of a split, including those of an earlier fetch, and where it ends."""
    shards, place = _resume(folder, split.name)
    if place and place.done:
        return shards, place
    stream = _Stream(data, split, place or Place(revision or _revision(data)), folder)
    texts: list[str] = []
    size = 0
    for text in stream.texts(excluded):
        length = len(text.encode())
        if not stream.takes(length):
            break
        texts.append(text)
        size += length
        if size >= SHARD_BYTES:
            shards.append(_write_shard(folder / f"{split.name}-{len(shards):05d}.parquet", texts, stream.saved()))
            texts, size = [], 0
        if stream.place.documents % 256 == 0 or not texts:
            progress(f"fetching {split.name} text", stream.place.bytes, split.limit or VAL_FETCH_BYTES)
    if not stream.place.documents:
        raise UserError(
            f"{data.repo}/{split.files[0]}: no {split.name} document in column {data.text_field!r}; check [data]"
        )
    stream.place.done = True
    shards.append(_write_shard(folder / f"{split.name}-{len(shards):05d}.parquet", texts, stream.saved()))
    return shards, stream.place


def _resume(folder: Path, split: str) -> tuple[list[dict[str, str]], Place | None]:
    """The whole shards of a split up to the first gap, and the place where the next one starts."""
    shards, place = [], None
    while (path := folder / f"{split}-{len(shards):05d}.parquet").exists() and not (place and place.done):
        try:
            place = Place(**json.loads(pq.read_metadata(path).metadata[b"place"]))
        except (pa.ArrowException, OSError):
            break  # damaged: it is fetched again
        shards.append({"name": path.name, "sha256": sha256(path)})
    return shards, place


def _write_shard(path: Path, texts: list[str], place: bytes) -> dict[str, str]:
    table = pa.table({"text": pa.array(texts, pa.large_string())}).replace_schema_metadata({b"place": place})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    _put(path, sink.getvalue())
    return {"name": path.name, "sha256": sha256(path)}


def _put(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; free up disk space or set AUTORESEARCH_CACHE") from None


class _Stream:
    """The rows of a split as `datasets` streams them, with retries, and the place reached."""

    def __init__(self, data: Data, split: Split, place: Place, folder: Path) -> None:
        self.data, self.split, self.place, self.folder = data, split, place, folder
        self.rows: Any = None  # the open IterableDataset

    def takes(self, length: int) -> bool:
        """Count a document of `length` bytes, unless it exceeds the limit."""
        place, limit = self.place, self.split.limit
        if place.documents and limit is not None and place.bytes + length > limit:
            return False
        place.documents, place.bytes = place.documents + 1, place.bytes + length
        return True

    def saved(self) -> bytes:
        state = self.rows.state_dict() if self.rows is not None else None
        return json.dumps(asdict(self.place) | {"state": state}).encode()

    def texts(self, excluded: set[bytes]) -> Iterator[str]:
        """Documents from the place on that belong to the split and are not `excluded`."""
        while self.place.file < len(self.split.files):
            for text in _with_retries(self.read, self.data, self.split.files[self.place.file]):
                belongs = self.place.file > 0 or self.place.row >= self.split.first
                if self.place.file == 0 and self.place.row == self.split.stop:
                    return
                self.place.row += 1
                if belongs and text and not text.isspace() and digest(text) not in excluded:
                    yield text
            self.place.file, self.place.row, self.place.state, self.rows = self.place.file + 1, 0, None, None

    def read(self) -> Iterator[str | None]:
        """Rows of the current file from the place on. After a failure, rows already read are not read again."""
        self.rows = self.open()
        if self.place.state:
            self.rows.load_state_dict(self.place.state)
        try:
            for row in self.rows:
                yield row[self.data.text_field]
        finally:
            self.place.state = self.rows.state_dict()

    def open(self) -> Any:
        """The current file by row groups: the unit that is fetched, and from which reading can resume."""
        name = self.split.files[self.place.file]
        load = partial(
            _library().load_dataset,
            "parquet",
            data_files=[f"hf://datasets/{self.data.repo}@{self.place.revision}/{name}"],
            split="train",
            streaming=True,
            storage_options={"hf": {"block_size": BLOCK_BYTES}},
        )
        rows = load(columns=[self.data.text_field])
        features = rows.features if self.data.text_field in rows.features else load().features
        check_column(f"{self.data.repo}/{name}", self.data.text_field, features.arrow_schema)
        return rows.reshard()


def _revision(data: Data) -> str:
    """The latest commit of the repository's main branch."""
    _library()
    from huggingface_hub import HfApi

    infos = _with_retries(lambda: iter([HfApi().dataset_info(data.repo, timeout=TIMEOUT)]), data, data.train_files[0])
    return next(infos).sha


def _library() -> Any:
    """The `datasets` module, without its own output and telemetry, and with all its caches in the cache folder."""
    check_endpoint()
    own = cache_root() / "hub"
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_UPDATE_CHECK"):
        os.environ.setdefault(name, "1")
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE"):
        os.environ.setdefault(name, str(own / name.removeprefix("HF_").removesuffix("_CACHE").lower()))
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.config.STREAMING_OPEN_MAX_RETRIES = datasets.config.STREAMING_READ_MAX_RETRIES = 1  # we retry
    for kind in ("OPEN_RETRY", "READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "READ_RATE_LIMIT_RETRY"):
        setattr(datasets.config, f"STREAMING_{kind}_INTERVAL", 0)
    if network.is_this_machine(endpoint := huggingface_hub.constants.ENDPOINT):
        others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        os.environ["no_proxy"] = f"{others},{urlsplit(endpoint).hostname}"
    with network.explained():
        huggingface_hub.get_session().timeout = TIMEOUT
    return datasets


def _with_retries(start: Callable[[], Iterator[Any]], data: Data, file: str) -> Iterator[Any]:
    """The items of start(), which is called again to resume after a temporary failure. Raises UserError."""
    failures = 0
    while True:
        try:
            for item in start():
                failures = 0
                yield item
            return
        except UserError:
            raise
        except Exception as error:
            message, temporary = _explain(error, data.repo, file)
            if not temporary or failures == len(DELAYS):
                raise UserError(message) from error
        time.sleep(DELAYS[failures])
        failures += 1


def _explain(error: BaseException, repo: str, file: str) -> tuple[str, bool]:
    """A message for a failure of the hub, and whether it may be temporary. Raises `error` itself if it is a bug."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    where = endpoint()
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), 0)
    if isinstance(error, OSError) and error.filename:  # of the library's cache, which is in ours
        return f"{error.filename}: {error.strerror}; free up disk space or set AUTORESEARCH_CACHE", False
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return f"{repo}: not fully downloaded, and HF_HUB_OFFLINE is set; unset it, {ALTERNATIVE}", False
    if status in (401, 403):
        return f"{repo}: access denied ({status}); set HF_TOKEN to a token with read access, {ALTERNATIVE}", False
    if status == 404 or any(isinstance(e, FileNotFoundError) for e in chain):
        return f"{repo}, {file}: not found at {where} (404); check repo and files in the preset, {ALTERNATIVE}", False
    if status:
        temporary = status >= 500 or status in (408, 429)
        return f"{repo}, {file}: {where} answers {status}; try again later, {ALTERNATIVE}", temporary
    if any(isinstance(e, httpx.HTTPError | ConnectionError | TimeoutError) for e in chain):
        reason = one_line(chain[-1])
        return f"{repo}: {where} cannot be reached ({reason}); try again later, {ALTERNATIVE}", True
    if isinstance(error, pa.ArrowException | UnicodeDecodeError) or type(error) is OSError:
        problem = f"not a complete parquet file with UTF-8 text ({one_line(error, 160)})"
        return f"{repo}, {file}: {problem}; check the preset and {where}, {ALTERNATIVE}", False
    if _is_unexpected_response(error):
        problem = f"{where} does not answer as a hub ({one_line(error, 160)})"
        return f"{repo}: {problem}; correct HF_ENDPOINT, {ALTERNATIVE}", False
    raise error


def check_endpoint() -> None:
    """Raises UserError if HF_ENDPOINT is not a URL: importing the client library would fail."""
    value = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        split = urlsplit(value)
        valid = split.scheme in ("http", "https") and split.hostname and split.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"HF_ENDPOINT is not an address: {value!r}; unset it or write https://host, {ALTERNATIVE}")


def endpoint() -> str:
    """The URL of the hub, and the variable that sets it, if any."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT} (HF_ENDPOINT)" if "HF_ENDPOINT" in os.environ else constants.ENDPOINT


def _is_unexpected_response(error: BaseException) -> bool:
    """Whether the client library failed on a response that is not the expected JSON, which it does not check."""
    shape = isinstance(error, ValueError | LookupError | TypeError | AttributeError)
    frames = traceback.extract_tb(error.__traceback__)
    return shape and any("huggingface_hub" in Path(frame.filename).parts for frame in frames)
