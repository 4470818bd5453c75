"""Everything that huggingface_hub writes, with files below 10 MiB. Prints what came back as JSON.

Usage: push_small.py ADAPTER_FOLDER BASE_FOLDER OTHER_FOLDER
"""

import json
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

adapter, base, other = map(Path, sys.argv[1:])
api, name = HfApi(), "lab/echo"
seen = {}


def fails(function, kind=HfHubHTTPError):
    """Status and message of the failure that must come."""
    try:
        function()
    except kind as error:
        return [error.response.status_code, str(error)]
    raise AssertionError(f"{function} did not fail")


seen["url"] = api.create_repo(name).repo_id
api.create_repo(name, exist_ok=True)
seen["own"] = api.create_repo("mine").repo_id
seen["exists"] = fails(lambda: api.create_repo(name))
secret = api.create_repo("lab/secret", private=True).repo_id
seen["hidden"] = [api.model_info(secret).private]
api.update_repo_settings(secret, private=False)
seen["hidden"].append(api.model_info(secret).private)
seen["gated"] = fails(lambda: api.update_repo_settings(secret, gated="auto"))
seen["draft"] = api.upload_file(
    repo_id=name, path_or_fileobj=b"---\nlicense: mit\n---\n\nFirst.\n", path_in_repo="README.md"
).oid
api.create_repo("lab/base")
api.upload_folder(repo_id="lab/base", folder_path=base)
first = api.upload_folder(repo_id=name, folder_path=adapter)
seen["first"] = first.oid
seen["again"] = api.upload_folder(repo_id=name, folder_path=adapter).oid
seen["copied"] = api.create_commit(
    name, [CommitOperationCopy("README.md", "docs/copy.md")], commit_message="a copy", parent_commit=seen["again"]
).oid
seen["tree"] = [item.path for item in api.list_repo_tree(name, recursive=True)]
api.delete_folder("docs", name)
seen["deleted"] = api.model_info(name).sha
seen["missing"] = fails(lambda: api.delete_file("nope.txt", name))
seen["stale"] = fails(
    lambda: api.create_commit(name, [CommitOperationAdd("x.txt", b"1")], commit_message="x", parent_commit="0" * 40)
)
seen["pickle"] = fails(lambda: api.upload_file(repo_id=name, path_or_fileobj=b"x", path_in_repo="adapter_model.bin"))
seen["nan"] = fails(lambda: api.upload_folder(repo_id=name, folder_path=other))
seen["after"] = api.model_info(name).sha
seen["pull request"] = fails(
    lambda: api.upload_file(repo_id=name, path_or_fileobj=b"1", path_in_repo="x.txt", create_pr=True)
)

api.create_branch(name, branch="dev")
api.create_branch(name, branch="dev", exist_ok=True)
api.upload_file(
    repo_id=name, path_or_fileobj=b"---\nlicense: mit\n---\n\nSecond.\n", path_in_repo="README.md", revision="dev"
)
api.create_tag(name, tag="stable", revision="main")
api.create_tag(name, tag="stable", revision="main", exist_ok=True)
api.create_tag(name, tag="v2.0.0", revision="dev")
seen["taken"] = fails(lambda: api.create_tag(name, tag="stable"))
refs = api.list_repo_refs(name)
seen["branches"] = {ref.name: ref.target_commit for ref in refs.branches}
seen["tags"] = {ref.name: ref.target_commit for ref in refs.tags}
seen["read"] = (Path(snapshot_download(name, revision="v2.0.0")) / "README.md").read_text()
api.delete_tag(name, tag="stable")
seen["version stays"] = fails(lambda: api.delete_tag(name, tag="2.0.0"))
api.delete_branch(name, branch="dev")
seen["no branch"] = fails(
    lambda: api.upload_file(repo_id=name, path_or_fileobj=b"1", path_in_repo="x", revision="dev"), RevisionNotFoundError
)
seen["history"] = [commit.title for commit in api.list_repo_commits(name)]

api.move_repo(name, "lab/voice")
seen["moved"] = fails(lambda: api.model_info(name), RepositoryNotFoundError)[0]
seen["in use"] = fails(lambda: api.delete_repo("lab/base"))
api.delete_repo("lab/voice")
api.delete_repo("lab/base")
seen["gone"] = [api.repo_exists("lab/voice"), api.repo_exists("lab/base")]
print(json.dumps(seen))
