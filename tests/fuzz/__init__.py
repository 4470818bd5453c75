"""Inputs that nobody thought of, for everything that reads what strangers wrote.

targets.py        what is read, each from bytes, with seeds to begin from
mutations.py      bytes changed a little, by a random generator or by hypothesis
test_targets.py   about 1,000 inputs, in `make test`
__main__.py       as many as are asked for, steered by coverage (atheris), in `make soak`
"""
