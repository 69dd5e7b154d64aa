"""The rules of `swarm/` on a virtual clock and a virtual network: what chaos does to them, and what a run will need."""
