"""The Hugging Face Hub's protocol, so that its clients work with HF_ENDPOINT and HF_TOKEN alone.

reading.py   repositories, trees, files, revisions
writing.py   commits
lfs.py       large files by Git LFS
xet.py       large files by Xet
signing.py   URLs and tokens that are a permission
repos.py     repositories, branches and tags come and go
listing.py   what is here, by tag, author and words
shapes.py    snapshots as the Hub's JSON
errors.py    failures as clients read them
requests.py  how its requests name things
"""
