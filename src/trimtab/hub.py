"""Adapter folders on the Hugging Face Hub, read and written. Knows hub ids and what can go wrong on the way; refuses to
know what is in a folder.

A place is a local folder, or `owner/name` with `@revision` behind it if wanted. What exists locally touches no network.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from trimtab import config
from trimtab.checkpoint import CONFIG, WHOLE_CONFIG, read_adapter_config, write_json
from trimtab.errors import UserError
from trimtab.report import write_report
from trimtab.run_folder import LOG, RUN, WHOLE, WRITTEN

DOWNLOADED = ("*.json", "*.safetensors", RUN)
"""What is fetched: no pickles and no code. run.yaml is plain settings, read by a loader that makes nothing but text."""
_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def at_hand(place: str | Path) -> Path:
    """The folder at a place; one on the hub is downloaded (DOWNLOADED alone) into the hub's cache, or found there.

    Raises UserError where there is no such thing on the hub, or it cannot be reached.
    """
    folder = Path(place).expanduser()
    named = _ID.fullmatch(str(place))
    if folder.exists() or named is None:
        return folder
    from huggingface_hub import snapshot_download

    with _one_sentence(named["id"], named["revision"], reading=True):
        found = snapshot_download(named["id"], revision=named["revision"], allow_patterns=list(DOWNLOADED))
    return Path(found)


def check_push(repo: str, base: str, what: str = "--base OWNER/NAME") -> None:
    """Raises UserError for a name that is no hub id, and for a base model that is a folder of this machine."""
    named = _ID.fullmatch(repo)
    if named is None or named["revision"]:
        raise UserError(f"{repo!r} is no name on the hub; it must be OWNER/NAME")
    if _is_here(base):
        raise UserError(f"the base model is the folder {base}, which nobody else has; name it on the hub: {what}")


def _is_here(base: str) -> bool:
    """Whether a base model is a folder of this machine."""
    path = Path(base).expanduser()
    return not base.startswith("pkg:") and (path.is_absolute() or path.exists())


def push(folder: str | Path, repo: str, *, base: str | None = None, private: bool = False) -> str:
    """Put a run or an adapter on the hub as `repo` (OWNER/NAME), with a model card; returns its address.

    `base` is where the base model is on the hub, where the folder names a place on this machine. Checkpoints and the
    log stay here, and places on this machine are named by their last part alone. The login is huggingface_hub's own
    (`hf auth login`, or HF_TOKEN). Raises UserError where the folder is no adapter of trimtab, and where the hub
    refuses or cannot be reached.
    """
    folder = Path(folder).expanduser()
    said = read_adapter_config(folder)
    check_push(repo, base or str(said["base"].get("path") or ""))
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as room:
        copy = Path(room) / "folder"
        _publishable(folder, copy, repo, said, base)
        api = HfApi()
        with _one_sentence(repo, None, reading=False):
            address = str(api.create_repo(repo, private=private or None, exist_ok=True))
            api.upload_folder(repo_id=repo, folder_path=copy, commit_message="trimtab push")
    return address


def _publishable(folder: Path, copy: Path, repo: str, said: dict[str, Any], base: str | None) -> None:
    """Links to the folder's files beside a configuration, settings and a card that name no place on this machine."""
    copy.mkdir()
    for path in {path for pattern in (*WRITTEN, *WHOLE) for path in folder.glob(pattern) if path.is_file()}:
        (copy / path.name).symlink_to(path.resolve())
    known = next(name for name in (WHOLE_CONFIG, CONFIG) if (folder / name).is_file())
    where = base or said["base"].get("path")
    write_json(copy / known, {**said, "base": {**said["base"], "path": where}})
    if (folder / RUN).is_file():
        values = {key: _anywhere(value) for key, value in config.read_yaml(folder / RUN, typed=True).items()}
        (copy / RUN).unlink()
        text = yaml.safe_dump({**values, "model": where}, sort_keys=False, allow_unicode=True)
        (copy / RUN).write_text(text, encoding="utf-8")
    if (folder / LOG).is_file():
        (copy / "curves.svg").unlink(missing_ok=True)
    write_report(copy, called=repo)
    (copy / LOG).unlink(missing_ok=True)


def _anywhere(value: Any) -> Any:
    """A setting without the folders of this machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


@contextmanager
def _one_sentence(repo: str, revision: str | None, *, reading: bool) -> Iterator[None]:
    """Turns what huggingface_hub raises into a UserError; none of the texts has a token in it."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login`"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{repo} on the hub asks for a consent that you have not given there") from None
    except errors.RepositoryNotFoundError:
        here = "there is no folder" if reading else "you may not write to"
        private = f"and no {repo} on the hub, or it is private: {log_in}" if reading else f"on the hub: {log_in}"
        raise UserError(f"{here} {repo} {private}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo} on the hub has no revision {revision!r}") from None
    except errors.LocalTokenNotFoundError:
        raise UserError(f"writing to the hub needs a login: {log_in}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = f": {log_in}" if status in (401, 403) else ""
        raise UserError(f"the hub answered {status} for {repo}{reason}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError, ConnectionError):
        here = f"there is no folder {repo}, and the hub" if reading else "the hub"
        raise UserError(f"{here} cannot be reached") from None
    except errors.HFValidationError:
        raise UserError(f"{repo!r} is no name on the hub; it must be OWNER/NAME") from None
