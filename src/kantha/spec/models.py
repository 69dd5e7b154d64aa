"""The run spec: everything that all peers of a run must agree on, and nothing else.

A spec is frozen and hashable to a fingerprint; the fingerprint is part of every DHT key, so that peers of different
specs never meet. What only one machine decides (its port, its disk, its micro-batch) is not in here.
"""

import hashlib
import json
import re
from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# C0 and C1 controls, line and paragraph separator, and what turns the direction of writing
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def _one_line(text: str) -> str:
    if found := _CONTROLS.search(text):
        raise ValueError(f"must be one line without control characters, not with U+{ord(found[0]):04X}")
    return text


# Text of strangers that pages and terminals show.
OneLine = Annotated[str, AfterValidator(_one_line)]


class _Part(BaseModel):
    # JSON has no infinities: volunteers would get another spec than the coordinator's
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSpec(_Part):
    """The network: an ALBERT, whose layers share their weights (Lan et al. 2020, arXiv 1909.11942)."""

    embedding_size: int = Field(128, ge=8, description="Width of the token embeddings, before they are projected up.")
    hidden_size: int = Field(768, ge=8, description="Width of the transformer layers.")
    intermediate_size: int = Field(3072, ge=8, description="Width of the feed-forward part of a layer.")
    layers: int = Field(12, ge=1, description="How many times the shared layer is applied.")
    layer_groups: int = Field(1, ge=1, description="How many groups of layers have weights of their own; 1 shares all.")
    attention_heads: int = Field(12, ge=1, description="Attention heads; must divide hidden_size.")
    max_positions: int = Field(512, ge=8, description="Longest sequence, in tokens, the model can ever read.")
    activation: Literal["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "tanh"] = Field(
        "gelu_new", description="Activation function of the feed-forward part."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout; ALBERT trains best without.")

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> "ModelSpec":
        if self.hidden_size % self.attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of attention_heads {self.attention_heads}"
            )
        if self.layers % self.layer_groups:
            raise ValueError(f"layers {self.layers} is no multiple of layer_groups {self.layer_groups}")
        return self


class TokenizerSpec(_Part):
    """The Unigram tokenizer (Kudo 2018), trained once when the run is created."""

    vocab_size: int = Field(32_000, ge=100, description="Pieces in the vocabulary, the special ones included.")
    training_documents: int = Field(100_000, ge=1, description="How many documents it is trained on, at most.")
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="Digest of the trained tokenizer; filled in by `kantha create`, leave it out before.",
    )


class ShobdoSource(_Part):
    """The embedded default: the dictionary in the PyPI package `shobdo`, an entry a document."""

    kind: Literal["shobdo"]
    weight: float = Field(1.0, gt=0, description="Share of this source in the mixture, relative to the others.")


class FileSource(_Part):
    """Files that every volunteer has at the same place: .txt (a document a line) or .jsonl (a record a document)."""

    kind: Literal["file"]
    path: str = Field(description="A .txt or .jsonl file, UTF-8.")
    text_field: str = Field("text", description="The field of a .jsonl record that holds the text.")
    weight: float = Field(1.0, gt=0, description="Share of this source in the mixture, relative to the others.")


class HuggingFaceSource(_Part):
    """A dataset of the Hugging Face hub, streamed, never downloaded whole."""

    kind: Literal["huggingface"]
    name: str = Field(description="The dataset's name on the hub, for example wikimedia/wikipedia.")
    config: str | None = Field(None, description="The dataset's configuration, for example 20231101.bn.")
    split: str = Field("train", description="The dataset's split.")
    revision: str | None = Field(None, description="A commit of the dataset, so that all volunteers read the same.")
    text_field: str = Field("text", description="The column that holds the text.")
    weight: float = Field(1.0, gt=0, description="Share of this source in the mixture, relative to the others.")


Source = Annotated[ShobdoSource | FileSource | HuggingFaceSource, Field(discriminator="kind")]


class FilterSpec(_Part):
    """Which documents are left out. `kantha corpus inspect` tells how many each rule drops."""

    least_letters: int = Field(0, ge=0, description="Shorter documents are left out.")
    script_share: float = Field(
        0.0, ge=0, le=1, description="Least share of a document's letters that are of the language's script."
    )
    repeated_lines: float = Field(
        1.0, ge=0, le=1, description="Largest share of a document's text that may be in lines it has had before."
    )
    duplicates: Literal["keep", "exact", "near"] = Field(
        "keep",
        description="What a volunteer has seen before is left out: the same text, or text of mostly the same words.",
    )


class DataSpec(_Part):
    """The text and how examples are cut from it."""

    sources: tuple[Source, ...] = Field(min_length=1, description="Where the text comes from, mixed by weight.")
    sequence_length: int = Field(512, ge=16, description="Tokens in one training example.")
    heldout_share: float = Field(
        0.01, gt=0, lt=0.5, description="Share of the documents kept for measuring, chosen by each document's hash."
    )
    shuffle_buffer: int = Field(10_000, ge=1, description="Documents that a peer holds back to shuffle them.")
    filters: FilterSpec = Field(FilterSpec(), description="Which documents are left out.")


Masking = Literal["token", "word", "ngram"]


class ObjectiveSpec(_Part):
    """Masked tokens and sentence order (Lan et al. 2020, sections 3.1 and 4.6)."""

    masked_share: float = Field(0.15, gt=0, lt=1, description="Share of the tokens that the model has to guess.")
    masking: Masking = Field(
        "ngram", description="What is masked: single tokens, whole words, or runs of one to three words."
    )
    swapped_share: float = Field(0.5, ge=0, le=1, description="Share of the sentence pairs given in the wrong order.")


class OptimizerSpec(_Part):
    """LAMB (You et al. 2020, arXiv 1904.00962), which bears large batches, or AdamW (Loshchilov and Hutter 2019)."""

    name: Literal["lamb", "adamw"] = Field(
        "lamb", description="lamb scales each matrix's step by the norm of its weights, adamw does not."
    )
    learning_rate: float = Field(1.76e-3, gt=0, description="Peak learning rate.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean of the gradient.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the mean of the squared gradient.")
    epsilon: float = Field(1e-6, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay; not on biases and LayerNorm.")
    weight_norm_clamp: float = Field(1e4, gt=0, description="Upper bound of the weight norm in LAMB's trust ratio.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the averaged gradient to this norm; 0 does not clip.")


class ScheduleSpec(_Part):
    """Learning rate and batch size by samples seen; the annealing at the end is ordered by `kantha anneal`."""

    warmup_samples: int = Field(
        2_000_000, ge=0, description="Samples over which the learning rate rises to its peak, where it stays."
    )
    ramp_samples: int = Field(
        0, ge=0, description="Samples over which a round grows from first_batch_size to its full size; 0: full at once."
    )
    first_batch_size: int = Field(256, ge=1, description="Examples that make the first round, where rounds grow.")
    goal_samples: int | None = Field(
        None,
        ge=1,
        le=10**15,
        description="Samples after which you mean to anneal: the goal on the run's page. It orders nothing by itself.",
    )


class SwarmSpec(_Part):
    """How the peers work together."""

    target_batch_size: int = Field(4_096, ge=1, description="Examples, from all volunteers, that make one round.")
    matchmaking_seconds: float = Field(10.0, gt=0, description="How long a group waits for a peer that does not come.")
    averaging_timeout: float = Field(120.0, gt=0, description="Seconds after which an averaging is given up.")
    compression: Literal["none", "fp16", "8bit"] = Field("8bit", description="Encoding of gradients on the wire.")
    checkpoint_rounds: int = Field(20, ge=1, description="The coordinator saves a checkpoint every this many rounds.")


BLANK = "___"


def _has_one_blank(sentence: str) -> str:
    if re.findall("_+", sentence) != [BLANK]:
        raise ValueError(f"must have one blank, written {BLANK}")
    return sentence


class EvaluationSpec(_Part):
    """What the coordinator asks of the model while the run goes on, beside its loss on held-out text."""

    sentences: tuple[Annotated[OneLine, Field(max_length=160), AfterValidator(_has_one_blank)], ...] = Field(
        (),
        max_length=8,
        description=f"Sentences with one word left blank ({BLANK}); the run's page shows what the model fills in.",
    )


Service = Literal["local", "kaggle", "colab", "hosted"]  # hosted: any other notebook that somebody lends


class ServiceSpec(_Part):
    """A place where volunteers run."""

    max_instances: int = Field(1, ge=1, description="How many instances one volunteer may run there at once.")
    rules: OneLine = Field(
        "",
        max_length=600,
        description="What this place allows, in plain words, for the run's page; empty: nothing to say.",
    )
    checked: date | None = Field(None, description="The day on which somebody looked these rules up, as 2026-06-07.")


class RunSpec(_Part):
    """All that the peers of one run agree on."""

    name: OneLine = Field(min_length=1, max_length=80, description="The run's name, as people read it.")
    goal: OneLine = Field("", max_length=400, description="One sentence for the run's page: what comes of it?")
    language: str = Field("bn", pattern="^[a-z]{2,3}$", description="ISO 639 code; chooses the normaliser.")
    seed: int = Field(0, ge=0, description="Seed of the initial weights and of every peer's walk through the data.")
    model: ModelSpec = Field(ModelSpec(), description="The network.")
    tokenizer: TokenizerSpec = Field(
        TokenizerSpec(), description="The tokenizer, trained once when the run is created."
    )
    data: DataSpec = Field(description="The text and how examples are cut from it.")
    objective: ObjectiveSpec = Field(ObjectiveSpec(), description="What the model learns to guess.")
    optimizer: OptimizerSpec = Field(OptimizerSpec(), description="How gradients become steps.")
    schedule: ScheduleSpec = Field(ScheduleSpec(), description="Learning rate and batch size by samples seen.")
    swarm: SwarmSpec = Field(SwarmSpec(), description="How the peers work together.")
    evaluation: EvaluationSpec = Field(EvaluationSpec(), description="What the model is asked while the run goes on.")
    services: dict[Service, ServiceSpec] = Field(
        {
            "local": ServiceSpec(max_instances=4),
            "kaggle": ServiceSpec(),
            "colab": ServiceSpec(),
            "hosted": ServiceSpec(),
        },
        description="Where volunteers may run, and how often at once; one that is left out is not allowed.",
    )

    @model_validator(mode="after")
    def _examples_fit_model(self) -> "RunSpec":
        if self.data.sequence_length > self.model.max_positions:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is longer than "
                f"model.max_positions {self.model.max_positions}"
            )
        return self

    @model_validator(mode="after")
    def _rounds_grow(self) -> "RunSpec":
        if self.schedule.ramp_samples and self.schedule.first_batch_size > self.swarm.target_batch_size:
            raise ValueError(
                f"schedule.first_batch_size {self.schedule.first_batch_size} is larger than "
                f"swarm.target_batch_size {self.swarm.target_batch_size}, to which rounds shall grow"
            )
        return self

    def canonical(self) -> bytes:
        """The one byte string that stands for this spec: JSON with sorted keys and no spaces, UTF-8."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical form, in hex; peers of different fingerprints never meet."""
        return hashlib.sha256(self.canonical()).hexdigest()
