"""MLflow's registry with as many models: `PYTHON mlflow_peer.py DATABASE MODELS PORT`, in an environment that has mlflow.

Each model has a version and a tag that names its base, as the adapters of tests.bench.reads have.
"""

import os
import sys

from mlflow.entities.model_registry import RegisteredModelTag
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

if __name__ == "__main__":
    uri, models, port = f"sqlite:///{sys.argv[1]}", int(sys.argv[2]), sys.argv[3]
    store = SqlAlchemyStore(uri)
    for number in range(models):
        tags = [RegisteredModelTag("base", f"base{1 + number % 2}"), RegisteredModelTag("kind", "lora")]
        store.create_registered_model(f"adapter{number}", tags, "an adapter")
        store.create_model_version(f"adapter{number}", "/nowhere", None)
    print("filled", flush=True)
    words = [
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--port",
        port,
        "--workers",
        "1",
        "--disable-security-middleware",
    ]
    os.execv(sys.executable, [sys.executable, *words])
