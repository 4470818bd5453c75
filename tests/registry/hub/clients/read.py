"""Read a hub with huggingface_hub: files, revisions, listings and failures. Prints what came back as JSON."""

import json
import sys
from pathlib import Path

from huggingface_hub import HfApi, file_exists, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

digest = sys.argv[1]
api = HfApi()


def fails(function, kind):
    """The message of the failure that must come."""
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"{function} did not fail")


adapter, base = api.model_info("team/shout", files_metadata=True), api.model_info("tiny")
folders = {revision: snapshot_download("team/shout", revision=revision)
           for revision in ("main", "1.0.0", "v1.0.0", "prod", "latest", digest, adapter.sha)}  # fmt: skip
result = {
    "who": api.whoami(token="any")["name"],
    "adapter": {"sha": adapter.sha, "tags": adapter.tags, "card": adapter.card_data and adapter.card_data.base_model,
                "files": {s.rfilename: s.size for s in adapter.siblings}},
    "base": {"sha": base.sha, "tags": base.tags, "files": [s.rfilename for s in base.siblings]},
    "folders": {revision: [Path(folder).name, sorted(path.name for path in Path(folder).iterdir())]
                for revision, folder in folders.items()},
    "weights": hf_hub_download("tiny", "model.safetensors"),
    "tree": [item.path for item in api.list_repo_tree("team/shout", recursive=True)],
    "paths": [item.path for item in api.get_paths_info("team/shout", ["adapter_config.json", "none"])],
    "refs": {tag.name: tag.target_commit for tag in api.list_repo_refs("team/shout").tags},
    "commits": [commit.title for commit in api.list_repo_commits("team/shout")],
    "parameters": api.get_safetensors_metadata("tiny").parameter_count,
    "exists": [file_exists("team/shout", "adapter_config.json"), file_exists("team/shout", "nothing"),
               api.repo_exists("team/shout"), api.repo_exists("team/nobody"),
               api.revision_exists("team/shout", "1.1.0"), api.revision_exists("team/shout", "9.9.9")],
    "failures": [
        fails(lambda: hf_hub_download("team/nobody", "config.json"), RepositoryNotFoundError),
        fails(lambda: hf_hub_download("team/shout", "x", revision="refs/pr/1"), RevisionNotFoundError),
        fails(lambda: hf_hub_download("team/shout", "x"), EntryNotFoundError),
        fails(lambda: api.model_info("team/.."), (HfHubHTTPError, ValueError)),
    ],
}  # fmt: skip
print(json.dumps(result))
