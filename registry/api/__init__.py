"""The registry over REST.

app.py       create_app(registry, jobs): the FastAPI application
examples.py  of every parameter, body and answer, for the OpenAPI
failures.py  every failure as {"error": {code, category, message, …}} and its status
guard.py     refuses requests that a web page of another origin sends
rules.py     what is refused because it comes over the network: local paths, odd file names
uploads.py   multipart bodies, streamed to files
deps.py      what routes are given
observing.py one log line and one count a request; metrics.py what is counted
limits.py    requests of one caller, and bodies that are read into memory
routes/      one file a noun
"""
