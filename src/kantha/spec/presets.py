"""Run specs to start from: `demo` for two cores and minutes, the others for a community."""

from datetime import date

from kantha.spec.models import (
    DataSpec,
    EvaluationSpec,
    HuggingFaceSource,
    ModelSpec,
    ObjectiveSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    Service,
    ServiceSpec,
    ShobdoSource,
    SwarmSpec,
    TokenizerSpec,
)


def noop(text: str) -> str:
    """Marks a text that the run's page translates, where it is as it is here."""
    return text


# Wikipedia and web text in the proportion of sahajBERT (2021), which had OSCAR where FineWeb-2 stands now.
_BENGALI_WEB = (
    HuggingFaceSource(kind="huggingface", name="wikimedia/wikipedia", config="20231101.bn", weight=0.23),
    HuggingFaceSource(kind="huggingface", name="HuggingFaceFW/fineweb-2", config="ben_Beng", weight=0.77),
)

# What a reader of Bengali fills in without thinking: a capital, a verb, a colour, a river, a poet, a language …
_BENGALI_SENTENCES = EvaluationSpec(
    sentences=(
        "বাংলাদেশের রাজধানীর নাম ___।",
        "আমি প্রতিদিন ভাত ___।",
        "আকাশের রং ___।",
        "পদ্মা একটি বড় ___।",
        "রবীন্দ্রনাথ ঠাকুর একজন বিখ্যাত ___।",
        "আমাদের মাতৃভাষা ___।",
        "সূর্য পূর্ব দিকে ___।",
        "মা তার ___ খুব ভালোবাসে।",
    )
)
# The free tiers, from what others have quoted of the services' own pages; these change, so the organizer looks again.
_SERVICES: dict[Service, ServiceSpec] = {
    "local": ServiceSpec(max_instances=4),
    "kaggle": ServiceSpec(
        rules=noop(
            "One notebook of one account at a time. A GPU for about 30 hours a week, 12 hours in one session. "
            "Internet and GPU are switched on in the notebook's settings, for which the account is verified by phone."
        ),
        checked=date(2025, 11, 21),
    ),
    "colab": ServiceSpec(
        rules=noop(
            "By Colab's FAQ, workers of distributed computing are not allowed in sessions without paid compute units, "
            "and may be ended at any time: help from there with paid units only. A session lasts at most 12 hours, "
            "less when nobody looks at it. One account only."
        ),
        checked=date(2026, 6, 7),
    ),
    "hosted": ServiceSpec(
        rules=noop("Any other notebook or server that somebody lends you: ask first whether it may train for others.")
    ),
}

PRESETS: dict[str, RunSpec] = {
    "demo": RunSpec(
        name="Kantha demo",
        goal=noop("A small ALBERT for Bengali, sewn together by a few volunteers on one machine in a few minutes."),
        model=ModelSpec(
            embedding_size=64, hidden_size=192, intermediate_size=768, layers=3, attention_heads=6, max_positions=128
        ),
        tokenizer=TokenizerSpec(vocab_size=4_000, training_documents=20_000),
        data=DataSpec(
            sources=(ShobdoSource(kind="shobdo"),), sequence_length=64, heldout_share=0.02, shuffle_buffer=2_000
        ),
        objective=ObjectiveSpec(masking="token"),  # easier than runs of words: the loss falls within minutes
        # at 2.5e-2 the loss falls faster, to what the frequencies of tokens give, and there it stays: the layers have
        # stopped telling texts apart (sentence order 51 % right after 44,000 samples; at this rate 76 % after 52,000)
        optimizer=OptimizerSpec(learning_rate=1e-2, beta2=0.98),
        schedule=ScheduleSpec(warmup_samples=1_000, goal_samples=30_000),
        swarm=SwarmSpec(target_batch_size=256, matchmaking_seconds=5.0, averaging_timeout=30.0, checkpoint_rounds=5),
        evaluation=_BENGALI_SENTENCES,
        services={"local": ServiceSpec(max_instances=16)},
    ),
    "albert-base": RunSpec(
        name="Bengali ALBERT base",
        goal=noop("An ALBERT-base for Bengali, trained by volunteers."),
        data=DataSpec(sources=_BENGALI_WEB),
        schedule=ScheduleSpec(goal_samples=80_000_000),
        evaluation=_BENGALI_SENTENCES,
        services=_SERVICES,
    ),
    "albert-large": RunSpec(
        name="Bengali ALBERT large",
        goal=noop("An ALBERT-large for Bengali, as sahajBERT was, trained by volunteers."),
        model=ModelSpec(hidden_size=1024, intermediate_size=4096, layers=24, attention_heads=16),
        data=DataSpec(sources=_BENGALI_WEB),
        # as many as sahajBERT saw: 19,519 rounds of 4,096
        schedule=ScheduleSpec(goal_samples=80_000_000),
        evaluation=_BENGALI_SENTENCES,
        services=_SERVICES,
    ),
}
