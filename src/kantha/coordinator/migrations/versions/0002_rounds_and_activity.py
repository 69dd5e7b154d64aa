"""Sums by round, peer, day and run, kept beside the contributions; whose a member is; when machines came and went."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# From what an older Kantha entered. That was on SQLite, whose CAST cuts off; on PostgreSQL there is nothing yet.
_DAY = "CAST(seen / 86400 AS INTEGER)"
_HAS_SAMPLES = "SUM(CASE WHEN samples > 0 THEN 1 ELSE 0 END)"
_FILL = (
    f"""INSERT INTO rounds (round, samples, told, mlm_loss_sum, sop_loss_sum, volunteers, seconds, waited, finished,
        learning_rate, reason)
    SELECT round, SUM(samples), SUM(CASE WHEN peers = 0 THEN 0 ELSE samples END),
        SUM(CASE WHEN samples > 0 THEN mlm_loss_sum ELSE 0 END),
        SUM(CASE WHEN samples > 0 THEN sop_loss_sum ELSE 0 END),
        {_HAS_SAMPLES}, SUM(seconds), SUM(waited),
        COALESCE(MIN(CASE WHEN samples > 0 THEN seen END), MIN(seen)), NULL,
        (SELECT reason FROM failed_rounds WHERE failed_rounds.round = contributions.round)
    FROM contributions GROUP BY round""",
    f"""INSERT INTO tallies (peer_id, samples, seconds, waited, rounds, first, seen)
    SELECT peer_id, SUM(samples), SUM(seconds), SUM(waited), {_HAS_SAMPLES}, MIN(seen), MAX(seen)
    FROM contributions GROUP BY peer_id""",
    f"""INSERT INTO activity (day, peer_id, samples, seconds, waited, rounds)
    SELECT {_DAY}, peer_id, SUM(samples), SUM(seconds), SUM(waited), {_HAS_SAMPLES}
    FROM contributions GROUP BY {_DAY}, peer_id""",
    f"""INSERT INTO totals (id, rounds, samples, failed, seconds, waited, thinned)
    SELECT 1, COALESCE({_HAS_SAMPLES}, 0), COALESCE(SUM(samples), 0),
        COALESCE(SUM(CASE WHEN samples > 0 AND reason IS NOT NULL THEN 1 ELSE 0 END), 0),
        COALESCE(SUM(seconds), 0), COALESCE(SUM(waited), 0), -1
    FROM rounds""",
    """UPDATE members SET person = COALESCE(
        (SELECT person FROM machines WHERE machines.peer_id = members.peer_id),
        (SELECT MAX(person) FROM certificates WHERE certificates.peer_id = members.peer_id),
        (SELECT id FROM people WHERE people.username = members.username))""",
)


def upgrade() -> None:
    op.create_table(
        "activity",
        sa.Column("day", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("waited", sa.Double(), nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("day", "peer_id"),
    )
    op.create_index("ix_activity_peer_id", "activity", ["peer_id"])

    op.create_table(
        "rounds",
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("told", sa.BigInteger(), nullable=False),
        sa.Column("mlm_loss_sum", sa.Double(), nullable=False),
        sa.Column("sop_loss_sum", sa.Double(), nullable=False),
        sa.Column("volunteers", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("waited", sa.Double(), nullable=False),
        sa.Column("finished", sa.Double(), nullable=False),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.Column("reason", sa.String(length=100), nullable=True),
        sa.PrimaryKeyConstraint("round"),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("person", sa.Integer(), nullable=False),
        sa.Column("service", sa.String(length=20), nullable=False),
        sa.Column("label", sa.String(length=60), nullable=False),
        sa.Column("began", sa.Double(), nullable=False),
        sa.Column("seen", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_sessions_peer_id", "sessions", ["peer_id"])
    op.create_index("ix_sessions_person", "sessions", ["person"])

    op.create_table(
        "tallies",
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("waited", sa.Double(), nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.Column("first", sa.Double(), nullable=False),
        sa.Column("seen", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("peer_id"),
    )
    op.create_table(
        "totals",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("waited", sa.Double(), nullable=False),
        sa.Column("thinned", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_contributions_seen", "contributions", ["seen", "peer_id", "samples"])

    op.add_column("members", sa.Column("person", sa.Integer(), nullable=True))
    op.create_index("ix_members_person", "members", ["person"])

    op.add_column("results", sa.Column("learning_rate", sa.Double(), nullable=True))

    for statement in _FILL:
        op.execute(statement)
