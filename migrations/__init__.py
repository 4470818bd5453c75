"""Alembic migrations of the catalogue; registry.db.migrate runs them."""
