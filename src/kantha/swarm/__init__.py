"""The swarm: peers, their identities, what they say to each other, and the rounds. Knows tensors, not models."""
