"""What is private is hidden below the services: every ORM query of adapters, versions or repositories is narrowed.

A service cannot forget the condition, because no service writes it. What is hidden is not found, as if it were not
there, in lookups, listings, searches and suggestions alike.
"""

from __future__ import annotations

from sqlalchemy import event
from sqlalchemy.orm import ORMExecuteState, with_loader_criteria

from registry.db import CatalogueSession
from registry.models import AdapterRow, RepositoryRow, VersionRow
from registry.services.audit import acting
from registry.services.namespaces import hidden_adapters, hidden_repositories

__all__ = ["hide_private"]


@event.listens_for(CatalogueSession, "do_orm_execute")
def hide_private(state: ORMExecuteState) -> None:
    """Add the condition to a SELECT of a session that does not act for an admin."""
    if not state.is_select or state.is_column_load or state.is_relationship_load:
        return
    principal = acting(state.session)
    if principal.is_admin:
        return
    hidden, repositories = hidden_adapters(principal), hidden_repositories(principal)
    state.statement = state.statement.options(
        with_loader_criteria(AdapterRow, AdapterRow.id.not_in(hidden), include_aliases=True),
        with_loader_criteria(VersionRow, VersionRow.adapter_id.not_in(hidden), include_aliases=True),
        with_loader_criteria(RepositoryRow, RepositoryRow.id.not_in(repositories), include_aliases=True),
    )
