"""Alembic's entry: migrates over the connection that the registry hands in, inside its transaction and lock."""

from alembic import context

from lavatar.platform.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
