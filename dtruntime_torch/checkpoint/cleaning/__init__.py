"""What is kept, what goes, in which order, and who asks for it.

To be read in this order:

- `retention`: what is kept, as a value.
- `stock` and `look`: what lies there; what is still needed, which is looked at before any file goes.
- `prune_plan`: what goes, computed from both.
- `removal_kinds`: the reasons why something goes, and how it stops being a checkpoint.
- `removals`: the order in which all of them go, remembered until it is done.
- `cleaner`: who calls that, and when: before and after a save, and by hand.
"""
