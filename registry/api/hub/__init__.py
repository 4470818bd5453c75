"""The Hugging Face Hub's protocol, so that its clients work with HF_ENDPOINT and HF_TOKEN alone.

reading.py   repositories, trees, files, revisions
shapes.py    snapshots as the Hub's JSON
errors.py    failures as clients read them
paths.py     the segments of its URLs
"""
