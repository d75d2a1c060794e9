"""An export on the Hub, by huggingface_hub's own login (`hf auth login`, or HF_TOKEN)."""

from __future__ import annotations

from pathlib import Path

from common.cli import UserError, log
from common.models.hub import SECONDS, within

REMEDY = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check(repo: str) -> None:
    """Refuse, before minutes are spent, a name that is none or not of the login, or a Hub that takes no files of it.

    Raises:
        UserError: it says which.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        login = within(SECONDS, HfApi().whoami)
    except errors.HFValidationError as error:
        raise UserError(f"--push_to_hub {repo} is no name of the Hub; give OWNER/NAME") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError("--push_to_hub: this machine is offline by HF_HUB_OFFLINE; unset it") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"--push_to_hub: nobody is logged in to the Hub; {REMEDY}") from error
    except TimeoutError as error:
        raise UserError(f"--push_to_hub: the Hub did not answer within {SECONDS:g} s; try later") from error
    except Exception as error:  # whatever its HTTP library makes of a refusal, or of a network that is not there
        raise UserError(f"--push_to_hub: {_reason(error)}; {REMEDY}") from error
    owner, slash, name = repo.rpartition("/")
    owners = [login["name"], *(one["name"] for one in login.get("orgs", ()))]
    if not slash or owner.lower() not in map(str.lower, owners):
        who = f"is not of {' or '.join(owners)}, who may write by this login" if slash else "names no owner"
        raise UserError(f"--push_to_hub {repo} {who}; give {owners[0]}/{name}")
    if login.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push_to_hub: the login of {owners[0]} may only read; {REMEDY}")


def push(folder: Path, repo: str) -> str:
    """Put the files of a folder into a repository, which is made, private, where there is none; its address.

    Raises:
        UserError: the Hub does not take them; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        if not api.repo_exists(repo):
            api.create_repo(repo, private=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{folder.name}, by distill-slm")
    except Exception as error:
        raise UserError(f"--push_to_hub {repo}: {_reason(error)}; the files are in {folder}") from error
    address = f"{api.endpoint}/{repo}"
    log(f"pushed {folder} to {address}")
    return address


def _reason(error: Exception) -> str:
    """What the Hub says, in its first line."""
    said = getattr(error, "server_message", None) or str(error)
    first = next((line for line in said.splitlines() if line.strip()), type(error).__name__)
    return f"the Hub refuses ({first.strip()[:200]})"
