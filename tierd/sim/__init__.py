"""The core under virtual devices and clients: `python -m tierd.sim --seed N` replays one run.

scenario     what there is: models, budget, devices, clients; drawn from a seed
world        an independent picture of memory: refuses what the machine must never do
virtual_client   what a client does, orderly or otherwise
agenda       what happens when: the clock and the heap of a run
sessions     clients as a server sees them; the promises about every answer
simulation   one machine: the invariants after every event, the promises at the end
fleet, fleet_simulation   the same for three tiers, at scale: `python -m tierd.sim --scale`
crowd        who comes and goes there; `devices`: its disks and links
"""
