"""Models at a hub that speaks Hugging Face's protocol: ``hf://owner/name``, as ``bgen.load`` and ``bgen push`` take it.

Files are kept in the hub's own cache, in which a file's name is the checksum that the hub gives for it. What is loaded
is compared with that every time, so a file that was changed on this machine is refused. The extra ``hub`` has the
library; its variables hold: ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HOME``, and ``HF_HUB_OFFLINE=1`` for what is in the
cache alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bgen.errors import UserError
from bgen.version import __version__

_ADDRESS = re.compile(r"hf:/{1,2}(?P<name>[^/@\s]+/[^/@\s]+)(@(?P<revision>\S+))?")  # pathlib makes one slash of two
WANTED = ("config.json", "*.safetensors", "*.csv", "preprocessing.json", "metrics.json", "README.md")
"""What is fetched of a repository; whatever else is in it stays there."""


def is_address(where: object) -> bool:
    """Whether a model is named by an address at a hub."""
    return str(where).startswith("hf:/")


def fetch(address: str | Path, revision: str | None = None) -> Path:
    """Bring a model into the cache, or find it there, and return its folder.

    Parameters
    ----------
    address
        ``hf://owner/name``, or ``hf://owner/name@revision``.
    revision
        Branch, tag or commit; default: the newest of branch main. Only a commit (40 digits) is the same for ever.

    Raises
    ------
    UserError
        If there is no such model, it may not be read, the hub does not answer and the cache has none, or a file in the
        cache is not what the hub said it is.
    """
    name, revision = _parse(address, revision)
    with _explained(name, revision) as library:
        folder = Path(
            library.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(WANTED),
                library_name="bgen",
                library_version=__version__,
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        )
    for path in sorted(folder.iterdir()):
        if _changed(path):
            raise UserError(
                f"{path} is not what the hub says it is: it was changed or damaged, on the way or on this machine."
                f" Remove {path.resolve()}, and load {address} again."
            )
    return folder


def push(
    folder: Path, address: str, *, private: bool = False, message: str = "A model of bgen", revision: str | None = None
) -> str:
    """Put a model directory into a repository at the hub, which is made if there is none; return the commit.

    Parameters
    ----------
    folder
        A model directory; the caller has loaded it, so it is whole.
    address
        ``hf://owner/name``, or ``hf://owner/name@branch``.
    private
        For a repository that is made now: for its owner alone.

    Raises
    ------
    UserError
        If the address is wrong, the hub refuses or does not answer, or the card's head is not as the hub wants it.
    """
    name, revision = _parse(address, revision)
    with _explained(name, revision) as library:
        hub = library.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="bgen", library_version=__version__)
        hub.create_repo(name, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=list(WANTED),
            delete_patterns=list(WANTED),  # of an older model, what this one does not have
        )
    return str(done.oid)


def _parse(address: str | Path, revision: str | None) -> tuple[str, str | None]:
    found = _ADDRESS.fullmatch(str(address))
    if found is None:
        raise UserError(f"{address} is no address of a model: write hf://owner/name, or hf://owner/name@revision.")
    if revision is not None and found["revision"] is not None and revision != found["revision"]:
        raise UserError(f"{address} names one revision, and revision={revision} another: give one of them.")
    return found["name"], revision or found["revision"]


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[Any]:
    """Give the library, and turn what it raises into one sentence."""
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise UserError("hf:// needs the library huggingface_hub: pip install 'bgen-flow[hub]'.") from None
    try:
        yield huggingface_hub
    except errors.GatedRepoError:
        raise UserError(f"{name} is for those whom its owner lets in: ask there, and set HF_TOKEN.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"The hub has no model {name}, or not for you: set HF_TOKEN if it is private.") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision '{revision}'.") from None
    except errors.LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub does not answer ({_first(error.__cause__ or error)})"
        raise UserError(f"{name} is not in the cache of this machine, and {why}.") from None
    except errors.OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set: nothing can be sent to the hub.") from None
    except errors.HFValidationError as error:
        raise UserError(f"'{name}' is no name of a model: {_first(error)}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the library, and those below it, raise of servers and networks
        raise UserError(f"The hub refuses {name}, or does not answer: {_first(error)}") from None


def _first(error: BaseException) -> str:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return said[0][:200]


def _changed(path: Path) -> bool:
    """Whether a file of the cache is not what its name says: git's SHA-1, or SHA-256 of large files.

    Where the file system knows no links, the cache holds plain files, of which nothing is known.
    """
    place = path.resolve()
    if place.parent.name != "blobs":
        return False
    content = place.read_bytes()
    if len(place.name) == 64:
        return hashlib.sha256(content).hexdigest() != place.name
    digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    digest.update(content)
    return digest.hexdigest() != place.name
