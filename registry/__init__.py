"""The registry: a versioned catalogue of adapters, tied to their base models by hash."""

__version__ = "0.1.0"
