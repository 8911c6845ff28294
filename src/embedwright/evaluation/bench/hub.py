"""Opens splits of a data set of the hub, or of the hub's filled cache where there is no connection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedwright.data.sources.build import BUILDERS
from embedwright.errors import InputError, OutOfReachError, as_input_error


def open_splits(
    repository: str, config: str, splits: Sequence[str], offline: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns tables of these splits by name, and the repository's commit. Fetches the files of these splits alone.

    `datasets` opens the files that the repository's card names. By the name of a repository, it would fetch the whole
    config, and offline it does not look into the hub's cache. `offline` asks nobody and takes what that cache has.

    Raises OutOfReachError for what can be found nowhere, with the place of the cache and how to fill it. Raises
    InputError if the repository has no such split, or the hub refuses it.
    """
    import datasets
    from huggingface_hub import DatasetCard, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    place = Path(constants.HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}"
    lacking = OutOfReachError(
        f"{repository}: the hub cannot be reached, and its cache {place} lacks {', '.join(splits)}. Where there is a "
        f"connection, `hf download {repository} --repo-type dataset --include README.md '{config}/*'` brings them: "
        "copy that folder here"
    )
    where: dict[str, Any] = {"repo_type": "dataset", "local_files_only": offline}
    try:
        card = Path(hf_hub_download(repository, "README.md", **where))
        configs = DatasetCard.load(card).data.to_dict().get("configs", [])
        own = [part for one in configs if one["config_name"] == config for part in one["data_files"]]
        files = {part["split"]: part["path"] for part in own}
        if missing := [split for split in splits if split not in files]:
            raise InputError(f"{repository} has no split {missing[0]} in {config}; it has {', '.join(files) or 'none'}")
        wanted = {split: files[split] for split in splits}
        commit = card.parent.name
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=list(wanted.values()), **where))
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise lacking from error
    except HfHubHTTPError as error:
        raise InputError(f"{repository}: the hub does not give it: {error}") from error
    tables = {}
    for split, path in wanted.items():
        if not any(folder.glob(path)):
            raise lacking
        builder = BUILDERS[Path(path.removesuffix(".gz")).suffix]
        with as_input_error(f"{repository}: {path}"):
            tables[split] = datasets.load_dataset(
                builder, data_files=str(folder / path), split="train", trust_remote_code=False
            )
    return tables, {repository: commit}
