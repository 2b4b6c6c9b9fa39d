"""Alembic migrations, forward only; each works with the code before it."""
