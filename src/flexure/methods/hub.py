"""Adapter files on the Hugging Face Hub: two files up, two files down.

The library is loaded when it is used. What the files hold is `surgery/adapter.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from flexure.addresses import first_line, import_extra
from flexure.contracts import AdapterError
from flexure.surgery.adapter import CONFIG, TENSORS

__all__ = ["adapter_folder", "push_folder"]

_PREFIX = "hf:"
_INSTALL = "pip install huggingface_hub"


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that `path` names: a local one, or a download of `hf:user/repo`.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        AdapterError: the repository cannot be read.
    """
    text = os.fspath(path)
    if not text.startswith(_PREFIX):
        return Path(text)
    hub = import_extra("huggingface_hub", install=_INSTALL)
    repo = text.removeprefix(_PREFIX)
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=[CONFIG, TENSORS]))
    except Exception as error:  # the library raises many unrelated types
        raise AdapterError(
            f"expected a repository of the Hugging Face Hub with an adapter at {text}, got: "
            f"{first_line(error)}; check the name and the connection"
        ) from error


def push_folder(
    save: Callable[[str], None], repo: str, *, private: bool, token: str | None
) -> None:
    """Uploads what `save` writes into a folder, in one commit.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        AdapterError: the upload failed.
    """
    hub = import_extra("huggingface_hub", install=_INSTALL)
    with TemporaryDirectory() as folder:
        save(folder)
        try:
            api = hub.HfApi(token=token)
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[CONFIG, TENSORS])
        except Exception as error:  # the library raises many unrelated types
            raise AdapterError(
                f"expected to upload the adapter to {_PREFIX}{repo}, got: {first_line(error)}; "
                f"check the name, the token and the connection"
            ) from error
