"""Run by Alembic, on the connection that migrations/__init__.py hands over."""

from alembic import context

from kantha.coordinator.database import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite changes a column by copying the table
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
