"""A registry at a URL: the same protocol as the local one, over REST.

RemoteRegistry ── registry/transfer.py   uploads and checked downloads
               └─ httpx                  /api/v1
"""
