"""The upload of a run's adapter, with its model card, to the Hugging Face hub: ``fedmmkt push RUN --to OWNER/NAME``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmmkt.common.config import ConfigError
from fedmmkt.common.model_card import CARD, NO_LICENSE
from fedmmkt.server_app.publish.card import weights_of, write_adapter_card
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.report.numbers import size

LOGIN = "log in by `hf auth login`, or set HF_TOKEN to a token that may write"


class PushError(RuntimeError):
    """An adapter could not be uploaded; the text says why, and what helps."""


@dataclass(frozen=True)
class Upload:
    """What is uploaded.

    Attributes
    ----------
    folder : Path
        The adapter's folder.
    files : tuple of Path
        Its files, each uploaded under its name.
    target : str
        ``owner/name`` on the hub.
    """

    folder: Path
    files: tuple[Path, ...]
    target: str

    def __str__(self) -> str:
        rows = [f"  {file.name}  {size(file.stat().st_size)}" for file in self.files]
        total = sum(file.stat().st_size for file in self.files)
        return "\n".join([f"{self.folder} to {self.target}:", *rows, f"  {total} bytes in all"])


def prepare_upload(run: Path, target: str) -> Upload:
    """List the files of a run's adapter for an upload; a card is written if there is none.

    A card that is there stays as it is, since somebody may have filled in the licence.

    Parameters
    ----------
    run : Path
        The run folder.
    target : str
        ``owner/name`` on the hub.

    Raises
    ------
    ConfigError
        If the run has no adapter, or the target is not of this form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(target)
    except HFValidationError as error:
        raise ConfigError(f"--to is {target!r}; allowed: owner/name as the hub has them ({error})") from None
    if target.count("/") != 1:
        raise ConfigError(f"--to is {target!r}; allowed: owner/name, with the owner (a user or an organisation)")
    folder = RunFolder(run).lora
    weights_of(folder)
    if not (folder / CARD).exists():
        write_adapter_card(run)
    return Upload(folder, tuple(sorted(file for file in folder.iterdir() if file.is_file())), target)


def push_adapter(run: Path, target: str, private: bool = False) -> str:
    """Upload a run's adapter with its model card to the Hugging Face hub; nothing else of the run is uploaded.

    The login is huggingface_hub's own: `hf auth login`, or the environment variable ``HF_TOKEN``.

    Parameters
    ----------
    run : Path
        The run folder.
    target : str
        ``owner/name`` on the hub; the repository is made if there is none.
    private : bool
        Whether the repository must be private.

    Returns
    -------
    str
        The address of the commit.

    Raises
    ------
    ConfigError
        If the run has no adapter, or the target is not of the form ``owner/name``.
    PushError
        If there is no login, the hub cannot be reached or refuses, or the repository is there and public though it must
        be private.
    """
    import httpx
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    upload = prepare_upload(run, target)
    if get_token() is None:
        raise PushError(f"there is no login for the hub; {LOGIN}")
    api = HfApi()
    try:
        api.create_repo(target, private=private or None, exist_ok=True)
        if private and not api.repo_info(target).private:
            raise PushError(f"{target} is there and public, and --private was asked for; nothing was uploaded")
        done = api.upload_folder(
            repo_id=target,
            folder_path=upload.folder,
            allow_patterns=[file.name for file in upload.files],
            commit_message="Adapter of a FedMMKT run",
        )
    except HfHubHTTPError as error:
        raise PushError(_explain(error, target, api.endpoint)) from None
    except (OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise PushError(
            f"{api.endpoint} cannot be reached ({str(error) or type(error).__name__}); check the network, HF_ENDPOINT, "
            "and that HF_HUB_OFFLINE is not set"
        ) from None
    return str(done.commit_url)


def main(arguments: Sequence[str] | None = None) -> int:
    """Upload what the command line names; return the exit code: 0, 1 if it failed, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="fedmmkt push", description="Upload a run's adapter, with its model card, to the Hugging Face hub."
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="the repository on the hub")
    parser.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    parser.add_argument("--dry-run", action="store_true", help="only list the files and their bytes")
    options = parser.parse_args(arguments)
    try:
        upload = prepare_upload(options.run, options.to)
        print(upload)
        if NO_LICENSE in (upload.folder / CARD).read_text(encoding="utf-8"):
            print(f"note: the licence in {upload.folder / CARD} is still to be filled in")
        if not options.dry_run:
            print(push_adapter(options.run, options.to, options.private))
    except ConfigError as error:
        parser.error(str(error))
    except PushError as error:
        parser.exit(1, f"fedmmkt push: {error}\n")
    return 0


def _explain(error: object, target: str, endpoint: str) -> str:
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", None)
    said = str(getattr(error, "server_message", None) or error).strip().splitlines()[0]
    if code == 401:
        return f"{endpoint} does not know the login ({said}); {LOGIN}"
    if code in (403, 404):
        return f"the login may not write to {target} ({said}); name an owner that you may write to, or {LOGIN}"
    return f"{endpoint} refused the upload to {target} ({said})"
