"""A folder to the Hugging Face Hub, in one commit."""

from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import PublishError
from ..files import first_line

__all__ = ["upload_folder"]


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    **kind: Any,
) -> str:
    """Upload a folder's files to a repository, which is created if it does not exist.

    Args:
        folder: All of its files.
        repo_id: 'ORGANISATION/NAME'.
        token: Access token; None takes the one that `hf auth login` has stored.
        private: For a new repository.
        revision: Branch to commit to.
        create_pr: Open a pull request instead.
        kind: What `huggingface_hub.create_repo` takes for Spaces: `repo_type`, `space_sdk`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        PublishError: If the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="timm_bcos", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, **kind)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type=kind.get("repo_type"), revision=revision,
            create_pr=create_pr, commit_message=f"Published with timm_bcos {__version__}",
        )  # fmt: skip
    except Exception as error:  # the client's own, its HTTP library's and the system's
        raise PublishError(
            f"cannot publish to {repo_id}: {first_line(error)}; check the name, the network and the token "
            f"(`hf auth login`, or token=...)"
        ) from error
    return str(commit.pr_url or commit.commit_url)
