"""Documents of a hub dataset, kept in parquet shards under the cache folder.

The files are streamed with `datasets`, one row group at a time, only as far as the preset asks. A shard carries in
its metadata the place in the stream where the next one starts, so that an interrupted fetch resumes behind its last
whole shard; the manifest comes last. A complete copy is used without contacting the hub, at the revision recorded
when the fetch began: remove the folder to fetch a newer one. Failures that may pass are tried again, others are one
UserError. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured as huggingface_hub reads them: once, when it is first
imported, which happens here only when there is something to fetch.

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
VAL_FETCH_BYTES = 8_000_000  # text taken from whole validation files, or val_bytes if that is more
DELAYS = (1.0, 2.0, 4.0)  # seconds before each new attempt, on top of huggingface_hub's own 23 s for file content
TIMEOUT = 10.0  # seconds without an answer from the hub
ELSEWHERE = "or work without the hub: PRESET=offline or FILES='folder/*.parquet'"
BLOCK_BYTES = 1 << 16  # read ahead of what parquet asks for: the next row group would fetch it again

Progress = Callable[[str, int, int], None]  # label, bytes of text done, bytes in all


class Kept(NamedTuple):
    """A complete local copy: what it is, and its shards in order."""

    identity: dict[str, Any]
    train: list[str]
    val: list[str]


@dataclass(frozen=True)
class Split:
    """The part of the hub's files that is training or validation text."""

    name: str  # train or val
    files: tuple[str, ...]
    first: int = 0  # first row of files[0] that belongs to it
    stop: int | None = None  # row of files[0] that ends it
    limit: int | None = None  # bytes of text that end it


@dataclass
class Place:
    """Where in the stream a shard ends, kept in its metadata: the next row to read, and what came before it."""

    revision: str  # commit that is read
    file: int = 0  # number of the file
    row: int = 0  # row of that file
    state: dict[str, Any] | None = None  # of the IterableDataset in front of that row
    documents: int = 0
    bytes: int = 0
    done: bool = False


def fetch(data: Data, progress: Progress) -> Kept:
    """The documents a hub preset asks for, fetched as far as they are not here. Raises UserError."""
    if not data.train_files or not data.val_files:
        raise UserError(f"{data.repo}: a hub preset needs train_files and val_files; name them in [data]")
    asked = {**asdict(data), "val_bytes": max(VAL_FETCH_BYTES, data.val_bytes), "format": FORMAT}
    folder = cache_root() / "text" / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    manifest = _complete(folder, progress) or _fetch(folder, data, progress)
    train, val = ([str(folder / shard["name"]) for shard in manifest[split]] for split in ("train", "val"))
    return Kept(manifest["identity"], train, val)


def _complete(folder: Path, progress: Progress) -> dict[str, Any] | None:
    """The manifest of a whole, undamaged copy. A damaged shard is removed, to be fetched again."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    shards = [(folder / shard["name"], shard["sha256"]) for shard in manifest["val"] + manifest["train"]]
    damaged = [shard for shard, digest in shards if not shard.exists() or sha256(shard) != digest]
    for shard in damaged:
        progress(f"{shard.name} is damaged: fetching it again", 0, 0)
        shard.unlink(missing_ok=True)
    return None if damaged else manifest


def _fetch(folder: Path, data: Data, progress: Progress) -> dict[str, Any]:
    """Fetch validation text, then training text without it, each from where an earlier fetch stopped."""
    limit = max(VAL_FETCH_BYTES, data.val_bytes)
    val = Split("val", data.val_files, limit=limit)
    if any(data.val_documents):
        val = Split("val", data.val_files[:1], *data.val_documents)
    train = Split("train", data.train_files, data.train_from, limit=data.train_bytes)
    val_shards, place = _fetch_split(folder, data, val, "", set(), progress)
    seen = {digest(text) for text in read_documents([str(folder / shard["name"]) for shard in val_shards], "text")}
    train_shards, place = _fetch_split(folder, data, train, place.revision, seen, progress)
    read = {"val": asdict(val), "train": {**asdict(train), "files": train.files[: place.file + 1]}}
    identity = {"source": "hub", "repo": data.repo, "revision": place.revision, "field": data.text_field, **read}
    manifest = {"identity": identity, "val": val_shards, "train": train_shards}
    _put(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def _fetch_split(
    folder: Path, data: Data, split: Split, revision: str, seen: set[bytes], progress: Progress
) -> tuple[list[dict[str, str]], Place]:
    """Name and digest of every shard of a split, those that are here already included, and where it ends."""
    shards, place = _resume(folder, split.name)
    if place and place.done:
        return shards, place
    stream = _Stream(data, split, place or Place(revision or _revision(data)), folder)
    texts: list[str] = []
    size = 0
    for text in stream.texts(seen):
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
        raise UserError(f"{data.repo}/{split.files[0]}: no {split.name} document in column {data.text_field!r}")
    stream.place.done = True
    shards.append(_write_shard(folder / f"{split.name}-{len(shards):05d}.parquet", texts, stream.saved()))
    return shards, stream.place


def _resume(folder: Path, split: str) -> tuple[list[dict[str, str]], Place | None]:
    """The whole shards of a split without a gap, and the place where the next one starts."""
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
        raise UserError(f"{path}: {error.strerror}; free some space there or set AUTORESEARCH_CACHE") from None


class _Stream:
    """The rows of a split as `datasets` streams them, surviving failures that pass, and the place reached."""

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

    def texts(self, seen: set[bytes]) -> Iterator[str]:
        """Documents from the place on that belong to the split and are not `seen`."""
        while self.place.file < len(self.split.files):
            for text in _patiently(self.read, self.data, self.split.files[self.place.file]):
                belongs = self.place.file > 0 or self.place.row >= self.split.first
                if self.place.file == 0 and self.place.row == self.split.stop:
                    return
                self.place.row += 1
                if belongs and text and not text.isspace() and digest(text) not in seen:
                    yield text
            self.place.file, self.place.row, self.place.state, self.rows = self.place.file + 1, 0, None, None

    def read(self) -> Iterator[str | None]:
        """Rows of the current file from the place on; what has been read when it fails is not read again."""
        self.rows = self.open()
        if self.place.state:
            self.rows.load_state_dict(self.place.state)
        try:
            for row in self.rows:
                yield row[self.data.text_field]
        finally:
            self.place.state = self.rows.state_dict()

    def open(self) -> Any:
        """The current file, one row group a time: the unit that is fetched, and where reading can start again."""
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
    """The commit that the repository's main branch is at."""
    _library()
    from huggingface_hub import HfApi

    answer = _patiently(lambda: iter([HfApi().dataset_info(data.repo, timeout=TIMEOUT)]), data, data.train_files[0])
    return next(answer).sha


def _library() -> Any:
    """The `datasets` module, without output of its own, telemetry, or caches outside our folder and the token's."""
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
        beside = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        os.environ["no_proxy"] = f"{beside},{urlsplit(endpoint).hostname}"
    with network.explained():
        huggingface_hub.get_session().timeout = TIMEOUT
    return datasets


def _patiently(start: Callable[[], Iterator[Any]], data: Data, file: str) -> Iterator[Any]:
    """Items of start(), which is called again, to go on, after a failure that may pass. Raises UserError."""
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
            complaint, passes = _explain(error, data.repo, file)
            if not passes or failures == len(DELAYS):
                raise UserError(complaint) from error
        time.sleep(DELAYS[failures])
        failures += 1


def _explain(error: BaseException, repo: str, file: str) -> tuple[str, bool]:
    """What the user can do about a failure of the hub, and whether it may pass. Raises `error` if it is a bug."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    where, elsewhere = endpoint(), ELSEWHERE
    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), 0)
    if isinstance(error, OSError) and error.filename:  # the library's own cache, in ours
        return f"{error.filename}: {error.strerror}; free some space there or set AUTORESEARCH_CACHE", False
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return f"{repo}: not here in full, and HF_HUB_OFFLINE forbids to fetch it; unset it, {elsewhere}", False
    if status in (401, 403):
        return f"{repo}: access refused ({status}); set HF_TOKEN to a token that may read it, {elsewhere}", False
    if status == 404 or any(isinstance(e, FileNotFoundError) for e in chain):
        return f"{repo}, {file}: not found at {where} (404); check repo and files, {elsewhere}", False
    if status:
        passes = status >= 500 or status in (408, 429)
        return f"{repo}, {file}: {where} answers {status}; try again later, {elsewhere}", passes
    if any(isinstance(e, httpx.HTTPError | ConnectionError | TimeoutError) for e in chain):
        reason = one_line(chain[-1])
        return f"{repo}: {where} cannot be reached ({reason}); try again later, {elsewhere}", True
    if isinstance(error, pa.ArrowException | UnicodeDecodeError) or type(error) is OSError:
        what = f"not a whole parquet file with UTF-8 text ({one_line(error, 160)})"
        return f"{repo}, {file}: {what}; check the preset and {where}, {elsewhere}", False
    if _is_about_an_answer(error):
        return (
            f"{repo}: {where} does not answer as a hub ({one_line(error, 160)}); correct HF_ENDPOINT, {elsewhere}",
            False,
        )
    raise error


def check_endpoint() -> None:
    """Raise UserError when HF_ENDPOINT is no address: the client library would fail as it is imported."""
    value = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        split = urlsplit(value)
        whole = split.scheme in ("http", "https") and split.hostname and split.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise UserError(f"HF_ENDPOINT is not an address: {value!r}; unset it or write https://host, {ELSEWHERE}")


def endpoint() -> str:
    """Where the hub is, and who says so."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT} (HF_ENDPOINT)" if "HF_ENDPOINT" in os.environ else constants.ENDPOINT


def _is_about_an_answer(error: BaseException) -> bool:
    """Whether the client library stumbled over JSON of another shape, or none: it checks neither."""
    shape = isinstance(error, ValueError | LookupError | TypeError | AttributeError)
    frames = traceback.extract_tb(error.__traceback__)
    return shape and any("huggingface_hub" in Path(frame.filename).parts for frame in frames)
