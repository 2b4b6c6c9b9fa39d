"""The migrations give the tables that the code describes, on both databases, whatever process runs them."""

import os
import re
import subprocess
import sys

import pytest
from alembic import command
from sqlalchemy import Inspector, create_engine, inspect, make_url, text

from app.db import tables
from app.db.base import Base
from app.db.migrating import migrate, migration_config
from tests.conftest import ROOT


def inspector(url: str) -> Inspector:
    named = make_url(url)
    return inspect(create_engine(named.set(drivername="postgresql+psycopg") if "postgres" in url else named))


def test_the_migrations_leave_nothing_for_autogenerate_to_find(empty_url: str) -> None:
    migrate(empty_url)
    command.check(migration_config(empty_url))


def test_a_column_that_the_migrations_lack_is_found(empty_url: str) -> None:
    """The check above would be worth nothing if it compared nothing."""
    migrate(empty_url)
    found = inspector(empty_url)
    with found.engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs DROP COLUMN strikes"))
    found.engine.dispose()
    with pytest.raises(Exception, match="strikes"):
        command.check(migration_config(empty_url))


def test_migrating_again_changes_nothing(empty_url: str) -> None:
    migrate(empty_url)
    found = inspector(empty_url)
    before = sorted(found.get_table_names())
    migrate(empty_url)
    assert sorted(inspect(found.engine).get_table_names()) == before
    assert set(before) == {*Base.metadata.tables, "alembic_version"}
    found.engine.dispose()


def test_rows_of_the_first_version_stay_and_its_code_goes_on_writing(empty_url: str) -> None:
    """In a rolling update the version before runs on over the new tables."""
    command.upgrade(migration_config(empty_url), "0001")
    found = inspector(empty_url)

    def write(name: str) -> None:
        with found.engine.begin() as connection:
            connection.execute(text(f"INSERT INTO predictions (id, answer, created_at) VALUES ('{name}', '{{}}', 1.5)"))
            connection.execute(text(f"INSERT INTO encodings (key, blob, summary) VALUES ('{name}', 'blob', '{{}}')"))
            connection.execute(
                text(
                    "INSERT INTO jobs (id, kind, name, status, spec, epoch, attempts, strikes, event_seq, created_at) "
                    f"VALUES ('{name}', 'train', '{name}', 'queued', '{{}}', 0, 0, 0, 0, 1.5)"
                )
            )
            connection.execute(
                text(
                    'INSERT INTO checkpoints (job_id, "update", digest, files, bytes, created_at) '
                    f"VALUES ('{name}', 1, 'digest', '{{}}', 1, 1.5)"
                )
            )

    write("before")
    migrate(empty_url)
    for name in ("after", "and again"):
        write(name)
    with found.engine.begin() as connection:
        predictions = connection.execute(text("SELECT id, name FROM predictions ORDER BY id")).all()
        encodings = connection.execute(text("SELECT key, dataset FROM encodings ORDER BY key")).all()
        checkpoints = connection.execute(text("SELECT job_id, validation_loss FROM checkpoints ORDER BY job_id")).all()
    for rows in (predictions, encodings, checkpoints):
        assert [tuple(row) for row in rows] == [("after", None), ("and again", None), ("before", None)]
    found.engine.dispose()


def test_every_key_and_index_has_the_name_of_the_convention(empty_url: str) -> None:
    migrate(empty_url)
    found = inspector(empty_url)
    for table in Base.metadata.tables:
        assert found.get_pk_constraint(table)["name"] == f"pk_{table}"
        for unique in found.get_unique_constraints(table):
            assert unique["name"] == f"uq_{table}_{unique['column_names'][0]}"
        for foreign in found.get_foreign_keys(table):
            wanted = f"fk_{table}_{foreign['constrained_columns'][0]}_{foreign['referred_table']}"
            assert foreign["name"] == wanted
        for index in found.get_indexes(table):
            assert re.match(rf"(ix|uq)_{table}_", str(index["name"]))
    assert found.get_foreign_keys(tables.EventRow.__tablename__) != []
    found.engine.dispose()


def test_an_operator_and_a_deployment_may_migrate_at_once(empty_url: str) -> None:
    environment = os.environ | {"VERITUNE_DATABASE_URL": empty_url}
    migrations = [
        subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for words in (["app.cli", "migrate"], ["alembic", "upgrade", "head"])
    ]
    for migration in migrations:
        _, errors = migration.communicate(timeout=60)
        assert migration.returncode == 0, errors
    command.check(migration_config(empty_url))
