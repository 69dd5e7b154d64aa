"""The run at a glance: what `GET /api/v1/status` answers, and what the page, the console and the demo show."""

from pydantic import BaseModel, Field

ROUNDS_TOLD = 50  # newest rounds that a status carries
HELDOUT_TOLD = 500  # newest measured checkpoints that it carries


class VolunteerStatus(BaseModel):
    """One peer that computes, as its own latest report tells."""

    name: str | None = Field(description="The name that its owner is shown by; null: not shown.")
    number: int | None = Field(None, description="Of its owner, as in /volunteers/NUMBER; null: not shown.")
    peer_id: str = Field(description="The hash of its public key, as libp2p writes it.")
    state: str = Field(description="What it is doing, one word or two, for people: training, averaging, …")
    round: int = Field(description="Rounds that it has finished.")
    samples_in_round: int = Field(description="Its samples towards the running round.")
    samples: int = Field(description="All samples of it that counted in a finished round.")
    samples_per_second: float = Field(description="How fast it computes.")
    loss: float | None = Field(description="Mean training loss of its last round.")
    device: str = Field(description="What it computes on, in its own words.")
    seconds_since_seen: float = Field(description="Since its latest report.")


class RoundStatus(BaseModel):
    """One finished round, added up from the volunteers' reports; where one did not come, its samples are those that
    the round's result has of it."""

    round: int = Field(description="The round's number, starting at 1.")
    samples: int = Field(description="Examples whose gradients went into it.")
    loss: float | None = Field(
        description="mlm_loss + sop_loss, the mean over the samples that were reported; None where none were."
    )
    mlm_loss: float | None = Field(description="Loss of guessing the masked tokens, nats per token.")
    sop_loss: float | None = Field(description="Loss of guessing the sentence order, nats per pair.")
    volunteers: int = Field(description="Peers that took part.")
    finished: float = Field(description="When the first report of it arrived, seconds since 1970.")
    seconds: float | None = Field(None, description="Its length: since the round before finished.")
    learning_rate: float | None = Field(None, description="Of the step that ended it; None where it is not known.")
    computing_share: float | None = Field(
        None, description="Share of its volunteers' time that they computed; None where none was reported."
    )
    failed: bool = Field(description="True where no group could finish it at first, and it was tried again.")
    reason: str | None = Field(None, description="Why it failed, in the words of a peer.")


class HeldoutStatus(BaseModel):
    """What the model of one round scores on a fixed sample of text that no volunteer trains on."""

    round: int = Field(description="The round of the checkpoint; 0 are the weights that the run began with.")
    loss: float = Field(description="mlm_loss + sop_loss, the same sum as a round's training loss.")
    mlm_loss: float = Field(description="Loss of guessing the masked tokens, nats per token.")
    mlm_accuracy: float = Field(description="Share of the masked tokens that were guessed right.")
    sop_loss: float = Field(description="Loss of guessing the sentence order, nats per pair.")
    sop_accuracy: float = Field(description="Share of the pairs whose order was guessed right.")
    masked: int = Field(description="Masked tokens in the sample.")
    pairs: int = Field(description="Pairs in the sample.")


class Guess(BaseModel):
    """One word that the model would put into a blank."""

    word: str = Field(description="As it stands in the model's vocabulary.")
    probability: float = Field(description="How likely the model thinks that word, 0 to 1.")


class BlanksStatus(BaseModel):
    """What the model of one round fills into the blanks of the run spec's `evaluation.sentences`."""

    round: int = Field(description="The round of the checkpoint; 0 are the weights that the run began with.")
    guesses: list[list[Guess]] = Field(description="For each sentence, in the spec's order, the likeliest words first.")


class RunStatus(BaseModel):
    """The run, now."""

    name: str = Field(description="Of the run, as its organizer gave it.")
    goal: str = Field(description="What the run is for, in a sentence.")
    goal_samples: int | None = Field(
        None, description="Samples after which the organizer means to anneal; None: nothing is said of that."
    )
    fingerprint: str = Field(description="SHA-256 of the canonical spec: by this the run is known.")
    address: str = Field(description="The run's link, which volunteers join by.")
    round: int = Field(description="Finished rounds of the swarm.")
    target_batch_size: int = Field(description="Samples that make the running round.")
    samples_in_round: int = Field(description="Samples of all volunteers towards the running round.")
    samples: int = Field(description="Samples in all finished rounds.")
    samples_per_second: float = Field(description="What the present volunteers compute together.")
    seconds_to_next_round: float | None = Field(description="At that speed; null: nobody computes.")
    failed_rounds: int = Field(description="Finished rounds that had to be tried again.")
    computing_share: float | None = Field(
        description="Share of the volunteers' time that they computed; the rest was lost to communication."
    )
    checkpoint_round: int = Field(description="Round of the newest checkpoint.")
    learning_rate: float = Field(description="Of the step that ends the running round.")
    paused: str = Field("", description="Why the moderators paused the run; empty: it goes on.")
    annealed: float | None = Field(
        None,
        description="Share of the annealing that is done, 0 to 1; at 1 the run is finished. None: it was not ordered.",
    )
    volunteers: list[VolunteerStatus] = Field(description="Who is here now, by name.")
    heldout: list[HeldoutStatus] = Field(
        description=f"The last {HELDOUT_TOLD} checkpoints that were measured on held-out text, oldest first."
    )
    rounds: list[RoundStatus] = Field(
        description=f"The last {ROUNDS_TOLD} finished rounds, oldest first; the totals above are of all of them."
    )
    problem: str = Field(
        "", description="What is wrong with the run's records now, in a sentence; the figures may be old then."
    )
