"""Published weights: download to a cache, with resume, a lock, and a record of source and SHA-256.

Files with an address are stored in the cache of `torch.hub` (`TORCH_HOME`), as timm does; repositories of the
Hugging Face hub in the hub's own cache (`HF_HOME`). Beside each file, or in the cache of `torch.hub` for
files of the hub, a `.json` file records where it came from. A second call needs no network.
"""

import dataclasses
import errno
import hashlib
import http.client
import json
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from timm.models import PretrainedCfg

from lightspine.errors import LightspineError, UsageError
from lightspine.models.pickle_check import check_pickled_file
from lightspine.utils.files import atomic_write_text, parse_json
from lightspine.utils.progress import byte_progress

TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of a model in timm's layout (`save_for_hf`), the safe one first."""

# Files of a hub repository that may be checkpoints.
_CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# First bytes of a zip archive (torch.save), of a pickle (its old format); safetensors is told by byte 8.
_CHECKPOINT_HEADS = (b"PK", b"\x80")
_BLOCK = 1 << 20
_ATTEMPTS = 3
_TIMEOUT_S = 30.0
_CONNECT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A downloaded checkpoint and where it came from.

    Attributes:
        name: model and tag, such as `vmamba_tiny.in1k`.
        path: the file.
        source: its address, or `hf-hub:ORG/NAME/FILE`.
        sha256: SHA-256 of the file at its first download.
        size: bytes.
        license: license that the authors state, "" if none.
        downloaded: date and time of the download, ISO 8601.
    """

    name: str
    path: Path
    source: str
    sha256: str
    size: int
    license: str
    downloaded: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def verify(self) -> str | None:
        """Return what is wrong with the file, or `None` if it is the one that was downloaded."""
        if not self.path.is_file():
            return "the file is missing"
        found = hash_file(self.path)
        return None if found == self.sha256 else f"its SHA-256 is {found}, {self.sha256} was downloaded"


def default_cache_dir() -> Path:
    """Return the folder of downloaded files: `checkpoints` in the folder of `torch.hub`, as in timm."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def has_weights(cfg: PretrainedCfg) -> bool:
    """Return whether weights can be downloaded from what a configuration names."""
    return bool(cfg.url or cfg.hf_hub_id)


def fetch_weights(
    name: str,
    cfg: PretrainedCfg,
    cache_dir: str | Path | None = None,
    *,
    fits: Callable[[Path], bool] = lambda _: True,
    published_score: str = "",
) -> WeightsFile:
    """Return the checkpoint that a pretrained configuration names; downloads it at the first call.

    Args:
        name: registered name of the model.
        cfg: timm's pretrained configuration, with `url`, or `hf_hub_id` and possibly `hf_hub_filename`.
        cache_dir: folder of the downloads; by default `default_cache_dir()` and the cache of the hub.
        fits: tells whether a file belongs to the model, for a repository with the files of several models.
        published_score: the score that the authors report, for the message about missing weights.

    Raises:
        UsageError: the authors offer no file that a program can download, or the process is offline.
        LightspineError: the download failed, or no file of the repository belongs to the model.
    """
    full_name = f"{name}.{cfg.tag}" if cfg.tag else name
    if not has_weights(cfg):
        raise UsageError(_no_address(name, cfg, published_score))
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    if cfg.hf_hub_id:
        return _fetch_from_hub(full_name, cfg, cfg.hf_hub_id, folder, cache_dir, fits)
    url = str(cfg.url)
    path = download(url, folder)
    record = _read_record(_record_path(path))
    if record is None or record.name != full_name:
        # The file may have been put here by hand, or by timm.
        record = _record(full_name, path, url, cfg, record.sha256 if record else hash_file(path))
        _write_record(_record_path(path), record)
    return dataclasses.replace(record, path=path)


def cached_weights(cache_dir: str | Path | None = None) -> list[WeightsFile]:
    """Return the downloaded weights of a cache folder, sorted by name."""
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    records = (_read_record(path) for path in sorted(folder.glob("*.json")))
    return sorted((record for record in records if record), key=lambda record: record.name)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, folder: Path) -> Path:
    """Download a checkpoint into a folder unless it is there, and return its path.

    One process at a time downloads a file. An interrupted download continues where it stopped if the server
    allows; the complete file appears at once.

    Raises:
        UsageError: the process is offline (`HF_HUB_OFFLINE`) and the file is not there.
        LightspineError: the server cannot be reached, refuses, or sends something else than a checkpoint; the
            connection was cut; or the disk is full.
    """
    path = folder / _file_name(url)
    if path.is_file():
        return path
    if _is_offline():
        raise UsageError(
            f"{path.name} is not in {folder} and HF_HUB_OFFLINE is set: unset it to download {url}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{path.name}.lock"):
            # Another process may have finished it in the meantime.
            if not path.is_file():
                _download_part(url, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise LightspineError(f"cannot download {url}: no space is left in {folder}") from error
        raise LightspineError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _download_part(url: str, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    for attempt in range(1, _ATTEMPTS + 1):
        total = _append(url, part)
        received = part.stat().st_size
        if total is None or received == total:
            break
        if received > total:
            part.unlink()
            raise LightspineError(f"{url} sent {received} bytes, expected {total}: try again")
        if attempt == _ATTEMPTS:
            host = urllib.parse.urlsplit(url).netloc
            raise LightspineError(
                f"the connection to {host} was cut after {received} of {total} bytes of {path.name}: run the "
                "command again to continue"
            )
    _check_is_checkpoint(part, url)
    digest = hash_file(part)
    part.replace(path)
    part.with_name(f"{part.name}.etag").unlink(missing_ok=True)
    # Without the name of the model, which the caller adds.
    _write_record(_record_path(path), _record("", path, url, None, digest))


def _append(url: str, part: Path) -> int | None:
    """Request the rest of a file and append it; return the size of the whole file if the server tells it."""
    # The version of the file that the part belongs to: the server starts again if the file has changed.
    tag_file = part.with_name(f"{part.name}.etag")
    tag = tag_file.read_text() if tag_file.is_file() and part.is_file() else ""
    received = part.stat().st_size if tag else 0
    headers = {"User-Agent": "lightspine"}
    if received:
        headers |= {"Range": f"bytes={received}-", "If-Range": tag}
    with _open_url(url, headers, part.parent) as response:
        if "text/html" in response.headers.get("Content-Type", ""):
            raise LightspineError(f"{url} is a web page, expected a checkpoint: {_by_hand(part.parent, url)}")
        if response.status != http.client.PARTIAL_CONTENT:
            received = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length) + received
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - received > free:
            raise LightspineError(
                f"cannot download {url}: {(total - received) / 2**20:.0f} MiB are needed in {part.parent}, "
                f"{free / 2**20:.0f} MiB are free"
            )
        tag_file.write_text(response.headers.get("ETag", ""))
        with part.open("ab" if received else "wb") as file:
            for block in byte_progress(_blocks(response), _file_name(url), total, received):
                file.write(block)
    return total


def _open_url(url: str, headers: dict[str, str], folder: Path) -> Any:
    if not url.startswith(("https://", "http://")):
        raise UsageError(f"expected an http or https address, received {url}")
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and "Range" in headers:
            whole = {name: text for name, text in headers.items() if name == "User-Agent"}
            return _open_url(url, whole, folder)
        raise LightspineError(
            f"cannot download {url}: the server answered {error.code} {error.reason}"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise LightspineError(
            f"cannot download {url}: {getattr(reason, 'strerror', None) or reason}; on a machine with a "
            f"connection, {_by_hand(folder, url)}"
        ) from error


def _blocks(response: Any) -> Iterator[bytes]:
    """Yield what a server sends until the end of the file or of the connection."""
    while True:
        try:
            block = response.read(_BLOCK)
        except http.client.IncompleteRead as error:
            yield error.partial
            return
        except (TimeoutError, ConnectionError):
            return
        if not block:
            return
        yield block


def _check_is_checkpoint(part: Path, url: str) -> None:
    with part.open("rb") as file:
        head = file.read(9)
    if head.startswith(_CHECKPOINT_HEADS) or head[8:] == b"{":
        return
    part.unlink()
    what = "a web page" if head.lstrip().startswith(b"<") else "no checkpoint"
    raise LightspineError(
        f"{url} sent {what}, expected a PyTorch or safetensors file: {_by_hand(part.parent, url)}"
    )


def _by_hand(folder: Path, url: str) -> str:
    return f"open the address in a browser and save the file as {folder / _file_name(url)}"


def _file_name(url: str) -> str:
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _fetch_from_hub(
    full_name: str,
    cfg: PretrainedCfg,
    repository: str,
    folder: Path,
    cache_dir: str | Path | None,
    fits: Callable[[Path], bool],
) -> WeightsFile:
    # A plain file name, because the repository may be a user's.
    record_file = folder / f"{full_name}@{repository.replace('/', '--')}.json"
    known = _read_record(record_file)
    if known is not None and known.path.is_file():
        return known
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else _list_hub_files(repository)
    # A repository in timm's layout has one model, of any classes; its file is checked when it is loaded.
    standard = [name for name in TIMM_FILES if name in names][:1]
    for file_name in standard or names:
        path = hub_download(repository, file_name, cache_dir)
        if standard or fits(path):
            source = f"hf-hub:{repository}/{file_name}"
            record = _record(full_name, path, source, cfg, hash_file(path))
            _write_record(record_file, record)
            return record
    raise LightspineError(f"no file of the hub repository {repository} is a checkpoint of {full_name}")


def _list_hub_files(repository: str) -> list[str]:
    from huggingface_hub import list_repo_files

    name, revision = _split_revision(repository)
    with hub_errors(repository):
        files = list_repo_files(name, revision=revision)
    found = [name for name in files if name.endswith(_CHECKPOINT_SUFFIXES)]
    # The same weights are often there twice: safetensors needs no unpickling.
    return sorted(found, key=lambda name: (_CHECKPOINT_SUFFIXES.index(Path(name).suffix), name))


def hub_download(repository: str, file_name: str, cache_dir: str | Path | None = None) -> Path:
    """Return a file of "ORG/NAME" or "ORG/NAME@REVISION" on the Hugging Face Hub, downloaded once.

    Raises:
        LightspineError: the download failed.
        UsageError: the file is not in the cache and HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import hf_hub_download

    name, revision = _split_revision(repository)
    with hub_errors(f"{repository}/{file_name}"):
        return Path(hf_hub_download(name, file_name, revision=revision, cache_dir=cache_dir))


def check_hub_pickle(repository: str, cache_dir: str | Path | None) -> None:
    """Check the file of weights that timm unpickles for a repository, which is downloaded for it.

    Raises:
        LightspineError: a value in it is nested too deeply; see `lightspine.models.pickle_check`.
    """
    for file_name in ("model.safetensors", "pytorch_model.bin"):
        try:
            path = hub_download(repository, file_name, cache_dir)
        except LightspineError:
            # timm reports a repository without weights.
            continue
        if path.suffix == ".bin":
            check_pickled_file(path)
        return


def _split_revision(repository: str) -> tuple[str, str | None]:
    name, _, revision = repository.partition("@")
    return name, revision or None


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub, which has several kinds for each cause, into a sentence."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        with hub_reached_or_cached(what):
            yield
    except LightspineError:
        raise
    except Exception as error:
        if _is_offline() and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            raise UsageError(
                f"hf-hub:{what} is not in the cache and HF_HUB_OFFLINE is set: unset it to download the file"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise LightspineError(f"cannot download hf-hub:{what}: no space is left on the disk") from error
        if isinstance(error, LocalEntryNotFoundError):
            # The message does not say why; the error that it was raised from does.
            raise _not_reached(what, error.__cause__ or error) from error
        raise LightspineError(f"cannot download hf-hub:{what}: {_first_line(error)}") from error


@contextmanager
def hub_reached_or_cached(what: str) -> Iterator[None]:
    """Take files from the cache of the Hugging Face hub alone if the hub cannot be reached.

    huggingface_hub would try to connect again and again, for 23 seconds per file.

    Args:
        what: file or repository, for the message.

    Raises:
        LightspineError: the hub cannot be reached, and the file is not in the cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    problem = None if _is_offline() else _connection_problem(constants.ENDPOINT)
    if problem is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _not_reached(what, problem) from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _connection_problem(url: str) -> OSError | None:
    """Open a TCP connection to the host of a URL; return the error message, or `None` on success."""
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        # The proxy may reach it.
        return None
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return error
    return None


def _not_reached(what: str, reason: BaseException) -> LightspineError:
    return LightspineError(
        f"cannot download hf-hub:{what}: {_first_line(reason)}; copy the folder ~/.cache/huggingface/hub of "
        "a machine with a connection, or pass a file as checkpoint=PATH"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _record(name: str, path: Path, source: str, cfg: PretrainedCfg | None, sha256: str) -> WeightsFile:
    return WeightsFile(
        name=name,
        path=path,
        source=source,
        sha256=sha256,
        size=path.stat().st_size,
        license=(cfg.license if cfg else None) or "",
        downloaded=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _write_record(path: Path, record: WeightsFile) -> None:
    # A cache that cannot be written, such as one that an administrator fills, is used as it is.
    with suppress(LightspineError):
        atomic_write_text(path, json.dumps(record.as_dict(), indent=1) + "\n")


def _read_record(path: Path) -> WeightsFile | None:
    """Return the record in a file, or `None` if there is none; other files of the folder may be anything."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        record = WeightsFile(**values | {"path": Path(values["path"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    strings = (record.name, record.source, record.sha256, record.license, record.downloaded)
    return record if all(isinstance(s, str) for s in strings) and isinstance(record.size, int) else None


def _no_address(name: str, cfg: PretrainedCfg, published_score: str) -> str:
    score = f" (published: {published_score})" if published_score else ""
    return (
        f"no weights of {name}{score} can be downloaded by a program: download the authors' file from "
        f"{cfg.origin_url} with a browser, and pass it as lightspine.create_model({name!r}, checkpoint=PATH)"
    )
