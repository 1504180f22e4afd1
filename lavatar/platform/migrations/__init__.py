"""Alembic's migrations of the registry. Shipped in the package; run by lavatar.platform.registry at first use."""
