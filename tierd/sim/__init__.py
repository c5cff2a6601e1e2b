"""The core under virtual devices and clients: `python -m tierd.sim --seed N` replays one run.

scenario     what there is: models, budget, devices, clients; drawn from a seed
world        an independent picture of memory: refuses what the machine must never do
clients      virtual clients, orderly and otherwise
simulation   the heap of events, the invariants after each, the promises at the end
fleet, fleet_simulation   the same for three tiers, at scale: `python -m tierd.sim --scale`
"""
