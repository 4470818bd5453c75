"""List models with huggingface_hub. Prints names by query as JSON. Usage: listing.py FINGERPRINT."""

import json
import sys

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

api = HfApi()


def names(**query):
    """What a query lists, page by page."""
    return [item.id for item in api.list_models(**query)]


def refused(**query):
    """The message of a query that is refused."""
    try:
        names(**query)
    except HfHubHTTPError as error:
        return str(error)
    raise AssertionError(query)


print(
    json.dumps(
        {
            "all": names(),
            "limit": names(limit=2),
            "author": names(author="team"),
            "search": names(search="HOUT"),
            "base": names(filter="base_model:adapter:tiny"),
            "other": names(filter="base_model:adapter:other"),
            "hash": names(filter=f"base_hash:{sys.argv[1]}"),
            "both": names(filter=[f"base_hash:{sys.argv[1]}", "loud"], author="team"),
            "tag": names(filter="loud"),
            "peft": names(filter="peft"),
            "bases": names(filter=f"hash:{sys.argv[1]}"),
            "none": names(filter="nothing has this"),
            "created": names(sort="created_at"),
            "changed": names(sort="last_modified", limit=3),
            "downloads": names(sort="downloads"),
            "counts": {item.id: item.downloads for item in api.list_models()},
            "task": refused(pipeline_tag="text-generation"),
            "tags": {item.id: item.tags for item in api.list_models(author="team")},
        }
    )
)
