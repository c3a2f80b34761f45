"""Fine-tuning on the cluster: the session, its actors, policies in turn, and the evaluation of a
front.
"""
