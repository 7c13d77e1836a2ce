"""A deployed Hugging Face folder to the Hub, through huggingface_hub: its endpoint ($HF_ENDPOINT), its token ($HF_TOKEN, or `hf auth login`)."""

from __future__ import annotations

from pathlib import Path

from onnxsqueeze.errors import Unavailable, UsageError


def check_name(repo: str) -> None:
    """Raise UsageError unless ``repo`` can be a repository's name on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public in its documentation, absent from __all__

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push {repo}: is no name of a repository: {error}", remedy="name it OWNER/NAME") from error


def push(folder: Path, repo: str) -> str:
    """Send ``folder`` to the model repository ``repo`` as one commit; the commit's address. A repository that is not there is made, private.

    Files that the repository has beside these stay. Raises Unavailable where the Hub cannot be reached or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(library_name="onnxsqueeze")
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="onnxsqueeze deploy")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(
            f"--push {repo}: the Hub did not take it: {' '.join(said)}",
            remedy=f"look at the token ($HF_TOKEN, `hf auth login`), the name and the network; the folder is written: `hf upload {repo} {folder}` sends it",
        ) from error
    return str(commit.commit_url)
