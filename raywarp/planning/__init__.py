"""What a run is made from, resolved once; what it asks of the cluster; memory; checks before
anything starts.
"""
