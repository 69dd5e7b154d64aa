"""Run specs to start from: `demo` for two cores and minutes, the others for a community."""

from kantha.spec.models import (
    DataSpec,
    HuggingFaceSource,
    ModelSpec,
    ObjectiveSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    ServiceSpec,
    ShobdoSource,
    SwarmSpec,
    TokenizerSpec,
)

# Wikipedia and web text in the proportion of sahajBERT (2021), which had OSCAR where FineWeb-2 stands now.
_BENGALI_WEB = (
    HuggingFaceSource(kind="huggingface", name="wikimedia/wikipedia", config="20231101.bn", weight=0.23),
    HuggingFaceSource(kind="huggingface", name="HuggingFaceFW/fineweb-2", config="ben_Beng", weight=0.77),
)

PRESETS: dict[str, RunSpec] = {
    "demo": RunSpec(
        name="Kantha demo",
        goal="A small ALBERT for Bengali, sewn together by a few volunteers on one machine in a few minutes.",
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
        schedule=ScheduleSpec(warmup_samples=1_000),
        swarm=SwarmSpec(target_batch_size=256, matchmaking_seconds=5.0, averaging_timeout=30.0, checkpoint_rounds=5),
        services={"local": ServiceSpec(max_instances=16)},
    ),
    "albert-base": RunSpec(
        name="Bengali ALBERT base",
        goal="An ALBERT-base for Bengali, trained by volunteers.",
        data=DataSpec(sources=_BENGALI_WEB),
    ),
    "albert-large": RunSpec(
        name="Bengali ALBERT large",
        goal="An ALBERT-large for Bengali, as sahajBERT was, trained by volunteers.",
        model=ModelSpec(hidden_size=1024, intermediate_size=4096, layers=24, attention_heads=16),
        data=DataSpec(sources=_BENGALI_WEB),
    ),
}
