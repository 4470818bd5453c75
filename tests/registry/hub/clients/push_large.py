"""Push a folder, download it again, push it once more and one file as a stream. Prints what happened.

Usage: push_large.py REPOSITORY FOLDER
"""

import json
import sys
import time
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

name, folder = sys.argv[1], Path(sys.argv[2])
api = HfApi()
api.create_repo(name)
start = time.monotonic()
first = api.upload_folder(repo_id=name, folder_path=folder)
seconds = time.monotonic() - start
copy = Path(snapshot_download(name))
again = api.upload_folder(repo_id=name, folder_path=folder)
info = api.model_info(name, files_metadata=True)
print(
    json.dumps(
        {
            "oid": [first.oid, again.oid, info.sha],
            "large": sorted(item.rfilename for item in info.siblings if item.lfs),
            "same": all((copy / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir()),
            "seconds": seconds,
        }
    )
)
