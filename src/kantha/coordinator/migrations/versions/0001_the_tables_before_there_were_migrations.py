"""The tables before there were migrations. Where they are already, they stay as they are."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(length=16), nullable=False),
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("person", sa.Integer(), nullable=False),
        sa.Column("issued", sa.Integer(), nullable=False),
        sa.Column("expires", sa.Integer(), nullable=False),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.Column("signer", sa.String(length=64), nullable=False),
        sa.Column("certificate", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("serial"),
        if_not_exists=True,
    )
    op.create_index("ix_certificates_peer_id", "certificates", ["peer_id"], if_not_exists=True)
    op.create_index("ix_certificates_person", "certificates", ["person"], if_not_exists=True)

    op.create_table(
        "contributions",
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("lineage", sa.String(length=64), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("waited", sa.Double(), nullable=False),
        sa.Column("mlm_loss_sum", sa.Double(), nullable=False),
        sa.Column("sop_loss_sum", sa.Double(), nullable=False),
        sa.Column("peers", sa.Integer(), nullable=False),
        sa.Column("seen", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("round", "peer_id"),
        if_not_exists=True,
    )
    op.create_index("ix_contributions_peer_id", "contributions", ["peer_id"], if_not_exists=True)

    op.create_table(
        "decisions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("by", sa.String(length=120), nullable=False),
        sa.Column("action", sa.String(length=20), nullable=False),
        sa.Column("username", sa.String(length=96), nullable=False),
        sa.Column("reason", sa.String(length=300), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_table(
        "devices",
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("device", sa.String(length=60), nullable=False),
        sa.PrimaryKeyConstraint("peer_id"),
        if_not_exists=True,
    )
    op.create_table(
        "failed_rounds",
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(length=100), nullable=False),
        sa.PrimaryKeyConstraint("round"),
        if_not_exists=True,
    )
    op.create_table(
        "heldout_rounds",
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("mlm_loss", sa.Double(), nullable=False),
        sa.Column("mlm_accuracy", sa.Double(), nullable=False),
        sa.Column("sop_loss", sa.Double(), nullable=False),
        sa.Column("sop_accuracy", sa.Double(), nullable=False),
        sa.Column("masked", sa.Integer(), nullable=False),
        sa.Column("pairs", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("round"),
        if_not_exists=True,
    )
    op.create_table(
        "leases",
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("person", sa.Integer(), nullable=False),
        sa.Column("service", sa.String(length=20), nullable=False),
        sa.Column("instance", sa.String(length=60), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("renewed", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("peer_id"),
        if_not_exists=True,
    )
    op.create_index("ix_leases_person", "leases", ["person"], if_not_exists=True)

    op.create_table(
        "machines",
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("person", sa.Integer(), nullable=False),
        sa.Column("paired", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("peer_id"),
        if_not_exists=True,
    )
    op.create_index("ix_machines_person", "machines", ["person"], if_not_exists=True)

    op.create_table(
        "members",
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("username", sa.String(length=96), nullable=False),
        sa.Column("service", sa.String(length=20), nullable=False),
        sa.Column("joined", sa.Double(), nullable=False),
        sa.Column("expires", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("peer_id"),
        if_not_exists=True,
    )
    op.create_index("ix_members_username", "members", ["username"], if_not_exists=True)

    op.create_table(
        "nonces",
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("nonce", sa.String(length=32), nullable=False),
        sa.Column("issued", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("peer_id", "nonce"),
        if_not_exists=True,
    )
    op.create_index("ix_nonces_issued", "nonces", ["issued"], if_not_exists=True)

    op.create_table(
        "notice",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("signer", sa.String(length=64), nullable=False),
        sa.Column("notice", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_table(
        "pairings",
        sa.Column("code", sa.String(length=8), nullable=False),
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("service", sa.String(length=20), nullable=False),
        sa.Column("instance", sa.String(length=60), nullable=False),
        sa.Column("asked", sa.Double(), nullable=False),
        sa.Column("is_used", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("code"),
        if_not_exists=True,
    )
    op.create_index("ix_pairings_peer_id", "pairings", ["peer_id"], if_not_exists=True)

    op.create_table(
        "people",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("folded", sa.String(length=96), nullable=False),
        sa.Column("username", sa.String(length=96), nullable=False),
        sa.Column("subject", sa.String(length=100), nullable=True),
        sa.Column("state", sa.String(length=10), nullable=False),
        sa.Column("reason", sa.String(length=300), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("by", sa.String(length=120), nullable=False),
        sa.Column("is_moderator", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("folded"),
        sa.UniqueConstraint("subject"),
        if_not_exists=True,
    )
    op.create_index("ix_people_state", "people", ["state"], if_not_exists=True)

    op.create_table(
        "results",
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("lineage", sa.String(length=64), nullable=False),
        sa.Column("seen", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("round"),
        if_not_exists=True,
    )
    op.create_table(
        "rules",
        sa.Column("folded", sa.String(length=96), nullable=False),
        sa.Column("organisation", sa.String(length=96), nullable=False),
        sa.PrimaryKeyConstraint("folded"),
        if_not_exists=True,
    )
    op.create_table(
        "shares",
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("peer_id", sa.String(length=80), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("round", "peer_id"),
        if_not_exists=True,
    )
