"""Ray: resources, placement groups, health of actors, their faults, claims on the cluster, what a
node has, and the runtime's end.
"""
